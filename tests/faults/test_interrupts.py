"""Ctrl-C, and what the records of a run say after it or after a kill: real processes of the real tools."""

import json
import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from tests.faults.notes import TIMES, logged, weights
from tests.support.launch import ROOT
from tests.support.waiting import wait_until

NO_EXTRAS = ["log.pictures_every_epochs=null", "log.knn_every_epochs=null"]
SCRATCH = ["student.model=vit_tiny_patch16_224", "student.width=32", "student.depth=2", "student.num_heads=2"]
OFTEN = ["method=mae", "optim.epochs=12", "optim.warmup_epochs=1", "log.save_every_epochs=12", *NO_EXTRAS]
OFTEN += ["log.every_steps=7"]


def losses(finished):
    """What metrics.jsonl says of training, times left out."""
    records = [record for record in finished.records() if "loss" in record]
    return [{name: value for name, value in record.items() if name not in TIMES} for record in records]


def end_of(run):
    return json.loads((run / "exit.json").read_text())


@pytest.fixture(scope="module")
def alone(pretraining):
    """The uninterrupted run of one rank."""
    return pretraining("uninterrupted-1", *OFTEN)


@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_to_one_rank_saves_on_all_and_the_same_command_gives_the_same_bits(pretraining, alone, ranks):
    whole = alone if ranks == 1 else pretraining("uninterrupted-2", *OFTEN, ranks=2)
    started = pretraining.start(f"ctrl_c_cut-{ranks}", *OFTEN, ranks=ranks, FAULTS_PACE=0.02)
    wait_until(lambda: logged(started.run) > 1)
    started.signal(signal.SIGINT, ranks - 1)
    cut = started.finish(130)
    end = end_of(cut.run)
    assert end["exit_code"] == 130 and 14 <= end["step"] < 96
    assert f"stopped by Ctrl-C after step {end['step']}, which is saved" in cut.err
    assert ("continue with: " in cut.err) == (ranks == 1)
    whole_again = pretraining(f"ctrl_c_cut-{ranks}", *OFTEN, ranks=ranks)
    assert weights(whole_again) == weights(whole)
    assert losses(whole_again) == losses(whole)  # no line more or less, means over the cut included


def test_fine_tuning_stops_on_ctrl_c_too(finetuning):
    long = [*SCRATCH, "student.patch_size=8", "optim.epochs=12", "log.save_every_epochs=12", "log.eval_every_epochs=12"]
    whole = finetuning("ctrl_c_whole", *long)
    started = finetuning.start("ctrl_c_cut", *long, FAULTS_PACE=0.02)
    wait_until(lambda: logged(started.run) > 3)
    started.signal(signal.SIGINT)
    started.finish(130)
    again = finetuning("ctrl_c_cut", *long)
    assert weights(again) == weights(whole) and losses(again) == losses(whole)


def test_a_second_ctrl_c_leaves_at_once_and_says_what_was_saved_last(pretraining):
    """A step takes 2 s here: the first Ctrl-C waits for its end, the second does not."""
    started = pretraining.start("ctrl_c_twice", *OFTEN[:3], "log.save_every_epochs=0.25", *NO_EXTRAS, FAULTS_PACE=2)
    wait_until(lambda: (started.run / "checkpoints/step_000000002/COMPLETE").exists())
    started.signal(signal.SIGINT)
    time.sleep(0.4)
    started.signal(signal.SIGINT)
    ended = started.finish(130)
    end = end_of(ended.run)
    assert (end["exit_code"], end["step"]) == (130, 2)
    assert "second Ctrl-C: step 2 is" in end["reason"] and end["reason"] in ended.err


def test_a_kill_between_two_log_lines_leaves_no_trace_in_the_record(pretraining, alone):
    arguments = [*OFTEN, "log.save_every_epochs=1"]  # saves every 8 steps
    started = pretraining.start("record_killed", *arguments, FAULTS_PACE=0.05)
    wait_until(lambda: (started.run / "checkpoints/step_000000024/COMPLETE").exists())
    started.signal(signal.SIGKILL)
    step = int(started.finish(-9).last_checkpoint().name.removeprefix("step_"))
    assert losses(pretraining("record_killed", *arguments)) == losses(alone)
    log = (started.run / "train.log").read_text().splitlines()
    assert sum(line.startswith("=== ") for line in log) == 2
    assert any(line.startswith(f"continues at step {step} of 96") for line in log)
    assert log[-1].startswith("done: ")


def test_on_a_terminal_one_status_line_is_rewritten_and_nothing_is_wider(pretraining):
    words = [pretraining.config, f"run={pretraining.folder}/tty", *OFTEN, "optim.epochs=2", "log.every_steps=4"]
    shown = in_terminal([sys.executable, "-m", "maedistill", "pretrain", *words], columns=60)
    assert "\r\x1b[Kstep 0/16" in shown
    last = [line.rpartition("\x1b[K")[2].strip("\r") for line in shown.split("\n")]
    assert not [line for line in last if len(line) > 60 and " " in line.strip()]
    log = (pretraining.folder / "tty/train.log").read_text()
    assert "\x1b" not in log and "\r" not in log
    assert [line for line in log.splitlines() if "  step 4/16  loss " in line and line.split("eta ")[1]]  # in one line


def in_terminal(words, *, columns):
    """What a program prints to a terminal of so many columns."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm", "OMP_NUM_THREADS": "1"}
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "start_new_session": True}
    process = subprocess.Popen([*map(str, words)], cwd=ROOT, env=environment, **streams)
    os.close(theirs)
    shown = b""
    try:
        while data := os.read(ours, 65536):
            shown += data
    except OSError:  # the other side is closed
        pass
    os.close(ours)
    assert process.wait(60) == 0, shown.decode()
    return shown.decode()
