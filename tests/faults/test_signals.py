"""Signals, dead and frozen ranks, dead launchers: real processes, first of a tiny loop, then of the real tool."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.faults import ranks_under_fault as loop
from tests.faults.notes import logged, weights
from tests.support.waiting import lives, wait_until

PASS_ON = {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGUSR1", "PET_SHUTDOWN_TIMEOUT": "120"}  # torchrun's options


def lines(folder, rank):
    file = folder / f"rank-{rank}.txt"
    return file.read_text().splitlines() if file.exists() else []


def steps(folder, rank):
    return [line for line in lines(folder, rank) if line.startswith("step ")]


class Ranks:
    """The loop on two ranks, under way. However a test ends, they do."""

    def __init__(self, folder, fault="", workers=0):
        self.folder, self.processes = folder, loop.start_ranks(folder, fault, workers=workers)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.join()

    def signal(self, rank, number):
        """Send a signal once both ranks are well under way; return the time then."""
        wait_until(lambda: len(steps(self.folder, 0)) > 9 and len(steps(self.folder, 1)) > 9)
        os.kill(self.processes[rank].pid, number)
        return time.monotonic()

    def code(self, rank):
        """Return the exit code of a rank that ends by itself."""
        self.processes[rank].join(60)
        return self.processes[rank].exitcode

    def errors(self, rank):
        """Return what a rank said of its end: after its own lines, and after all stacks."""
        return [line for line in lines(self.folder, rank) if line.startswith(("error: ", "  fix: ", "exit.json "))]


def test_a_signal_to_one_rank_stops_both_after_the_same_step(tmp_path):
    with Ranks(tmp_path, workers=1) as ranks:
        ranks.signal(0, 0)  # signal 0 does nothing: this waits for the first steps
        for rank in range(2):
            worker = next(line for line in lines(tmp_path, rank) if line.startswith("worker "))
            os.kill(int(worker.split()[1]), signal.SIGTERM)  # reaches the workers, too: they go on
        before = len(steps(tmp_path, 1))
        ranks.signal(1, signal.SIGTERM)
        assert [ranks.code(rank) for rank in range(2)] == [75, 75]
    assert steps(tmp_path, 0) == steps(tmp_path, 1)
    last = len(steps(tmp_path, 1))
    assert before <= last < before + 100  # of 400
    assert lines(tmp_path, 0)[-1].startswith(f"stopped by SIGTERM after step {last}, which is saved")


@pytest.mark.parametrize(("lost", "number"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (0, signal.SIGSTOP)])
def test_a_rank_that_is_killed_or_frozen_is_named(tmp_path, lost, number):
    other = 1 - lost
    with Ranks(tmp_path) as ranks:
        start = ranks.signal(lost, number)
        assert ranks.code(other) == 5
        assert time.monotonic() - start < 2 * loop.TIMEOUT  # a busy machine wakes it late
        error, fix = (line for line in ranks.errors(other) if not line.startswith("exit.json"))
        assert error.startswith(f"error: rank {lost} ")
        assert error.endswith("ended, froze or cannot be reached")
        assert "the same command continues" in fix
        assert not any(line.startswith("Traceback") for line in lines(tmp_path, other))
        if number == signal.SIGSTOP:
            assert any(line.endswith("in _train") for line in lines(tmp_path, other))  # stacks: where it waits
        if lost == 0:  # nobody else can write it
            assert f"exit.json 5 {error.removeprefix('error: ')}" in ranks.errors(1)


def test_a_dead_rank_is_named_long_before_the_time_out_though_no_collective_fails(tmp_path):
    with Ranks(tmp_path, "dies unheard") as ranks:
        start = time.monotonic()
        assert ranks.code(0) == 5
        assert time.monotonic() - start < 60  # not 600
        error, fix = (line for line in ranks.errors(0) if not line.startswith("exit.json"))
        assert error.startswith("error: rank 1 ")
        assert "the same command continues" in fix
        assert f"exit.json 5 {error.removeprefix('error: ')}" in ranks.errors(0)


@pytest.mark.parametrize("slow", [False, True])
def test_a_rank_that_hangs_is_named_by_both_and_both_end(tmp_path, slow):
    with Ranks(tmp_path, "hang") as ranks:
        if slow:  # while rank 0 looks for the rank to blame, a busy machine does not run rank 1: it is not lost
            wait_until(lambda: len(steps(tmp_path, 1)) == 9)
            time.sleep(loop.TIMEOUT / 2)
            os.kill(ranks.processes[1].pid, signal.SIGSTOP)
            time.sleep(loop.TIMEOUT / 2 - 0.25)
            os.kill(ranks.processes[1].pid, signal.SIGCONT)
        assert [ranks.code(rank) for rank in range(2)] == [5, 5]
        for rank in range(2):
            causes = [line for line in ranks.errors(rank) if line.startswith("error: ")]
            assert len(causes) == 1
            assert ": rank 1 on " in causes[0]
            assert causes[0].endswith("; the others wait")
        assert any(line.endswith("in _do") for line in lines(tmp_path, 1))  # where it hangs
        assert sum(line.startswith("exit.json 5 ") for rank in range(2) for line in ranks.errors(rank)) == 1


def test_the_failure_of_one_rank_is_the_failure_of_all_and_cuts_off_no_checkpoint(tmp_path):
    with Ranks(tmp_path, "data while rank 0 saves") as ranks:
        assert [ranks.code(rank) for rank in range(2)] == [3, 3]
        assert ranks.errors(1) == ["error: shard 3 is gone", "  fix: bring it back"]
        assert ranks.errors(0)[0].endswith(": shard 3 is gone")
        assert ranks.errors(0)[1:] == ["  fix: bring it back"]  # once, though its watch waits for the same save
        assert "saved" in lines(tmp_path, 0)


def test_torchrun_passes_signals_on_and_leaves_nobody_behind(launcher, tmp_path):
    started = launcher.start(tmp_path, ["-m", loop.__name__, tmp_path, 1], ranks=2, by="torchrun", **PASS_ON)
    wait_until(lambda: len(steps(tmp_path, 0)) > 9 and len(steps(tmp_path, 1)) > 9)
    family = descendants(started.pids[0])
    assert len(family) >= 4  # two ranks with a worker each
    started.signal(signal.SIGUSR1)
    started.wait(timeout=60)
    wait_until(lambda: not any(lives(process) for process in family))
    assert steps(tmp_path, 0) == steps(tmp_path, 1)
    assert all(lines(tmp_path, rank)[-1].startswith("stopped by SIGUSR1 after step ") for rank in range(2))


def test_the_tool_stops_on_each_signal_and_the_same_command_gives_the_same_weights(pretraining):
    often = ["method=mae", "optim.epochs=12", "optim.warmup_epochs=1", "log.save_every_epochs=12", "data.workers=1"]
    often += ["log.pictures_every_epochs=null", "log.knn_every_epochs=null"]
    reference = pretraining("whole", *often, ranks=2)
    stopped = pretraining.folder / "stopped"
    seen = 0
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL):
        kill = number == signal.SIGKILL  # of torchrun, not of a rank
        started = pretraining.start("stopped", *often, ranks=2, launcher="torchrun" if kill else "fork", **PASS_ON)
        wait_until(lambda: logged(stopped) > seen + 2)  # noqa: B023
        family = [process for pid in started.pids for process in (pid, *descendants(pid))]
        assert len([process for process in family if not kill or parent(process) == started.pids[0]]) >= 2
        started.signal(number, 0 if kill else 1)
        started.finish(-9 if kill else 75)
        wait_until(lambda: not any(lives(process) for process in family))  # noqa: B023
        end = json.loads((stopped / "exit.json").read_text())
        seen = logged(stopped)
        name = "SIGTERM" if kill else number.name
        assert (end["exit_code"], end["step"]) == (75, seen)
        assert end["reason"].startswith(f"stopped by {name} after step {seen}")
        assert seen < 12 * 8  # it had not ended anyway
    finished = pretraining("stopped", *often, ranks=2)
    assert json.loads((stopped / "exit.json").read_text())["exit_code"] == 0
    assert weights(finished) == weights(reference)
    assert [record["loss"] for record in finished.metrics()] == [record["loss"] for record in reference.metrics()]


def test_the_tool_names_a_frozen_rank_and_ends(pretraining):
    often = ["method=mae", "optim.epochs=400", "engine.timeout_seconds=10", "log.save_every_epochs=400"]
    often += ["log.pictures_every_epochs=null", "log.knn_every_epochs=null"]
    started = pretraining.start("frozen", *often, ranks=2)
    wait_until(lambda: logged(started.run) > 10)
    started.signal(signal.SIGSTOP, 1)
    assert started.ended(60) == [0]
    assert started.wait(grace=0) == [5, -signal.SIGKILL]
    end = json.loads((started.run / "exit.json").read_text())
    assert end["exit_code"] == 5
    assert end["reason"].startswith("rank 1 on ")
    assert f"error: {end['reason']}\n  fix: " in started.err
    assert "most recent call first" in started.err


LOST_LAST = """
import os, runpy, sys
from maedistill.processes import distributed
from maedistill.runs import start

class LostAtTheEnd:
    def __getattr__(self, name):
        return (lambda: os._exit(9)) if name == "barrier" else getattr(distributed, name)

if os.environ["RANK"] == "1":
    start.distributed = LostAtTheEnd()  # the barrier at the end is the only one of that module
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_rank_that_is_lost_when_all_is_done_ends_the_others_with_code_5(pretraining, launcher, tmp_path):
    run, once = tmp_path / "run", ["method=mae", "optim.epochs=1", "log.pictures_every_epochs=null"]
    words = ["tools/pretrain.py", pretraining.config, f"run={run}", *once]
    started = launcher.start_text(tmp_path, LOST_LAST, *words, ranks=2)
    assert started.wait() == [5, 9]
    assert "error: another rank of this run was lost" in started.err and "Traceback" not in started.err
    assert json.loads((run / "exit.json").read_text())["reason"] == "finished"


def parent(process):
    """The parent's number of a process; 0 of one that has ended."""
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except FileNotFoundError:
        return 0


def descendants(process):
    """All processes that it started, and that those started."""
    parents = {int(folder.name): parent(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdecimal()}
    found = [process]
    for one in found:
        found += [child for child, whose in parents.items() if whose == one]
    return found[1:]
