"""train.log, the terminal beside it, and what the disk does to them."""

import errno
import io
import os
import sys

import pytest

from maedistill.errors import DataError, Preempted
from maedistill.runs import train_log
from maedistill.runs.terminal import wrapped
from maedistill.runs.train_log import TrainLog


def test_lines_wait_for_the_header_and_both_streams_and_the_error_are_in(tmp_path, capsys):
    log = TrainLog(tmp_path / "train.log")
    with pytest.raises(DataError), log.capture():
        print("early")
        assert not log.path.exists()
        log.begin("=== header")
        print("half", end="")
        print(" a line\nand", 1)
        print("warning: \x1b[31mred\x1b[0m", file=sys.stderr)
        raise DataError("it broke", "mend it")
    expected = ["=== header", "early", "half a line", "and 1", "warning: red", "error: it broke", "  fix: mend it"]
    assert log.path.read_text().splitlines() == expected
    assert capsys.readouterr().out == "early\nhalf a line\nand 1\n"  # as without a log
    print("after")
    assert "after" not in log.path.read_text()


def test_a_refused_start_leaves_no_line(tmp_path):
    log = TrainLog(tmp_path / "train.log")
    with pytest.raises(Preempted), log.capture():
        print("a line")
        raise Preempted("SIGINT", 3)
    assert not log.path.exists()


def test_a_full_disk_costs_lines_and_one_warning_and_never_the_run(tmp_path, monkeypatch):
    full, write = True, os.write

    def on_disk(descriptor, data):
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    monkeypatch.setattr(train_log.os, "write", on_disk)
    monkeypatch.setattr(sys, "__stderr__", terminal := io.StringIO())
    log = TrainLog(tmp_path / "train.log")
    with log.capture():
        log.begin("=== header")
        print("lost")
        full = False
        print("kept")
    assert log.path.read_text() == "kept\n"
    assert terminal.getvalue().count("cannot be written") == terminal.getvalue().count("\n") == 1


def test_a_reader_that_has_left_costs_the_log_no_line(tmp_path, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    log = TrainLog(tmp_path / "train.log")
    with open(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        with log.capture():
            log.begin("=== header")
            print("one", flush=True)
            print("two", file=sys.stderr, flush=True)
            print("3" * 100_000, flush=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)
    assert log.path.read_text().splitlines() == ["=== header", "one", "two", "3" * 100_000]


LINE = "epoch 0.2/30  step 20/3742  loss 1.1 (pixels 1.0686, align/8 0.1234, align/11 0.5678)  lr 9.19e-04  eta 7m25s"


@pytest.mark.parametrize("width", [20, 40, 60, 80, 200])
def test_a_line_breaks_between_fields_or_words(width):
    lines = wrapped(LINE, width)
    assert " ".join(" ".join(lines).split()) == " ".join(LINE.split())
    assert all(len(line) <= width for line in lines)
    if width == 80:
        assert lines[0] == "epoch 0.2/30  step 20/3742" and lines[-1].strip() == "eta 7m25s"
    assert wrapped("data     /a/very/long/path/that/has/no/spaces/train-*.tar", 20)[-1].endswith("train-*.tar")
