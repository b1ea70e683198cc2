"""Progress bars: on a terminal as tqdm draws them, in a pipe a line now and then, and none for what is short."""

import io

from maedistill.data.shards import progress_bar
from maedistill.data.shards.progress_bar import ProgressBar


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def drawn(stream: io.StringIO) -> str:
    with ProgressBar(total=5, desc="indexing shards", unit="shard", file=stream) as bar:
        for _ in range(5):
            bar.update()
    return stream.getvalue()


def test_a_pipe_gets_whole_lines_and_none_for_short_work(monkeypatch) -> None:
    assert "\r" in drawn(Terminal())
    assert drawn(io.StringIO()) == ""
    monkeypatch.setattr(progress_bar, "_PIPE_SECONDS", 0.0)
    lines = drawn(io.StringIO())
    assert "\r" not in lines and "indexing shards: 5/5 shard" in lines.splitlines()[-2]
    assert all(len(line) < 100 for line in lines.splitlines())
