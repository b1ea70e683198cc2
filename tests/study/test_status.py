"""The status line of running steps: what it reads from logs, rewritten on a terminal, rare in a pipe."""

import io
import time

import pytest

from maedistill.runs.metrics import progress_line
from maedistill.study import status
from maedistill.study.status import RunningStep, StatusLine, read_progress

VALUES = {"epoch": 2.5, "lr": 1e-3, "grad_norm": 0.5, "images_per_second": 100.0, "data_wait": 0.0, "memory_gb": 1.0}


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def steps(tmp_path, monkeypatch) -> list[RunningStep]:
    log = tmp_path / "a.log"
    losses = {"loss": 0.75, "pixels": 0.5, "align/2": 0.25}
    lines = [
        progress_line(losses, VALUES | {"eta_seconds": 130.0 - k}, step=k, total_steps=625, epochs=40) for k in (20, 40)
    ]
    log.write_text("x" * 5000 + "\n" + "\n".join(lines) + "\nepoch 2.5  kNN 80.0%\n")
    now = time.monotonic()
    monkeypatch.setattr(status.time, "monotonic", lambda: now)  # on a slow machine the steps would get older
    return [
        RunningStep("2/9", "dmae/seed_0/pretrain", log, now - 65),
        RunningStep("3/9", "mae/seed_0/export", tmp_path / "b.log", now - 65),
    ]


def test_the_last_progress_line_of_a_log_is_read(steps, tmp_path) -> None:
    assert read_progress(steps[0].log) == ("40/625", "0.7500", "1m30s")
    (tmp_path / "b.log").write_text("$ maedistill export x\n")
    assert read_progress(tmp_path / "b.log") is read_progress(tmp_path / "none.log") is None


def test_a_terminal_has_one_line_that_fits_and_goes_away(steps, monkeypatch) -> None:
    monkeypatch.setattr(status, "_TERMINAL_SECONDS", 0.0)
    long = "2/9 dmae/seed_0/pretrain: step 40/625, loss 0.7500, 1m30s left  |  3/9 mae/seed_0/export: 1m05s"
    short = "2/9 dmae pretrain 40/625 1m30s  |  3/9 mae/seed_0/export: 1m05s"
    for columns, text in ((120, long), (60, short[:59]), (20, short[:19])):
        monkeypatch.setenv("COLUMNS", str(columns))
        stream = Terminal()
        line = StatusLine(stream)
        line.update(steps)
        line.update(steps)
        line.print("done")
        shown = stream.getvalue().removesuffix("done\n")
        assert "\n" not in shown
        first = shown.split("\x1b[K")[0].removeprefix("\r")
        assert len(first) < columns and shown.count("loss") <= 1 and shown.endswith("\r\x1b[K")
        assert first == text


def test_a_pipe_gets_a_line_every_ten_seconds_at_most(steps, monkeypatch) -> None:
    now = time.monotonic()
    monkeypatch.setattr(status.time, "monotonic", lambda: now)
    stream = io.StringIO()
    line = StatusLine(stream)
    for _ in range(25):
        now += 1
        line.update(steps)
    assert stream.getvalue().count("\n") == 2 and "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()
