"""What a run writes beside its checkpoints, on a disk that takes nothing for a while."""

import errno
import os
import threading

import pytest

from maedistill.errors import DataError
from maedistill.runs import records
from maedistill.runs.records import AppendOnlyFile, ignore_write_errors, write_text


class Disk:
    """Stands for the disk: takes `room` bytes in all, and few at once."""

    def __init__(self, monkeypatch):
        self.room, self._write = 10**9, os.write
        monkeypatch.setattr(records.os, "write", self.write)

    def write(self, descriptor, data):
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = self._write(descriptor, data[: min(5, self.room)])
        self.room -= count
        return count


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


def test_no_line_is_lost_nor_torn_nor_said_twice(tmp_path, disk, capsys):
    lines = AppendOnlyFile(tmp_path / "a")
    lines.append("first")
    disk.room = 4  # in the middle of a line
    lines.append("second", "third")
    lines.append("fourth")
    assert capsys.readouterr().err.count("cannot be written (No space left on device); its lines are kept") == 1
    with pytest.raises(OSError, match="No space left"):
        lines.flush()
    with pytest.raises(DataError, match="a cannot be written"):
        lines.close()
    disk.room = 10**9
    lines.append("fifth")
    assert (tmp_path / "a").read_text().split() == ["first", "second", "third", "fourth", "fifth"]
    disk.room = 0
    lines.append("sixth")
    assert "its lines are kept" in capsys.readouterr().err  # it is full once more
    disk.room = 10**9
    lines.close()
    assert (tmp_path / "a").read_text().endswith("fifth\nsixth\n")


def test_a_line_that_comes_while_another_thread_writes_is_not_lost(tmp_path, monkeypatch):
    lines, write, added = AppendOnlyFile(tmp_path / "a"), os.write, []

    def slow_write(descriptor, data):
        if not added:
            added.append(threading.Thread(target=lines.append, args=("second",)))
            added[0].start()
            added[0].join(0.2)  # it waits for this write, or gets between its halves
        return write(descriptor, data)

    monkeypatch.setattr(records.os, "write", slow_write)
    lines.append("first")
    added[0].join()
    assert (tmp_path / "a").read_text().split() == ["first", "second"]


def test_what_a_restart_repeats_is_listed_once(tmp_path):
    AppendOnlyFile(tmp_path / "a", unique=True).append("one", "two", "one")
    AppendOnlyFile(tmp_path / "a", unique=True).append("two", "three")
    assert (tmp_path / "a").read_text().split() == ["one", "two", "three"]


def test_a_small_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write_text(tmp_path / "a", "old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(records.os, "replace", full)
    with pytest.raises(DataError, match=r"a cannot be written \(No space left on device\)"):
        write_text(tmp_path / "a", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old"


def test_what_can_be_spared_is_left_out(tmp_path, capsys):
    with ignore_write_errors(path := tmp_path / "picture.png"):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not path.exists() and "picture.png is left out" in capsys.readouterr().err
