"""Commands that need each other, as real processes: order, failures, one start at a time, no process left behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from maedistill.errors import ConfigError
from maedistill.study.runner import Step, StepsFailed, print_steps, run_steps
from tests.support.waiting import lives, wait_until

# A tool that notes its start and end, and fails, sleeps, waits for a file or leaves a child behind where it is told to.
TOOL = """\
import os, subprocess, sys, time
name, *words = sys.argv[1:]
JOBS = "MAEDISTILL_JOBS", "MAEDISTILL_GPU_JOBS"
def note(text):
    with open("notes.txt", "a") as file:
        shares = [os.environ.get(name) for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", *JOBS)]
        file.write(f"{text} {name} {' '.join(map(str, shares))}\\n")
note("starts")
open(f"{name}.begun", "w").close()
if "child" in words:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    open("child.txt", "w").write(str(child.pid))
if "sleep" in words:
    open("sleeps.txt", "w").write(str(os.getpid()))
    time.sleep(60)
limit = time.monotonic() + 20
while any(word.startswith("after=") and not os.path.exists(word[6:]) for word in words):
    if time.monotonic() > limit:
        sys.exit("waited in vain")
    time.sleep(0.02)
if "fail" in words:
    sys.exit("no luck\\nat all")
note("ends")
open(name, "w").close()
"""
PROGRAM = (sys.executable, "tool.py")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    (tmp_path / "tool.py").write_text(TOOL)
    (tmp_path / "x").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return tmp_path


def step(name: str, *words: str, needs: tuple[str, ...] = ()) -> Step:
    return Step(name, (name, *words), needs, done=Path(name).exists)


def run(folder: Path, *steps: Step, jobs: int = 1) -> list[str]:
    """Runs the steps; what was noted, in order."""
    run_steps(steps, program=PROGRAM, out=folder / "out", jobs=jobs)
    return notes(folder)


def notes(folder: Path) -> list[str]:
    return [" ".join(line.split()[:2]) for line in (folder / "notes.txt").read_text().splitlines()]


def test_one_after_the_other_in_the_order_of_their_needs(folder, capfd) -> None:
    found = run(folder, step("b", needs=("a",)), step("a"), step("c"))
    assert found == ["starts a", "ends a", "starts b", "ends b", "starts c", "ends c"]
    out = capfd.readouterr().out
    assert [line.partition(": done in ")[0] for line in out.splitlines()] == ["1/3 a", "2/3 b", "3/3 c"]
    assert {line.split()[4] for line in (folder / "notes.txt").read_text().splitlines()} == {"1"}


def test_what_is_done_is_skipped_with_a_line(folder, capfd) -> None:
    (folder / "a").touch()
    assert run(folder, step("a"), step("b", needs=("a",))) == ["starts b", "ends b"]
    assert "skips a: done\n" in capfd.readouterr().out
    assert run(folder, step("a"), step("b", needs=("a",))) == ["starts b", "ends b"]


def test_two_at_a_time_share_the_cores_and_write_to_logs(folder, monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(7)))
    both = step("a", "after=x/b.begun"), step("x/b", "after=a.begun")
    found = run(folder, *both, step("c", needs=("a",)), jobs=2)
    assert set(found[:2]) == {"starts a", "starts x/b"} and found.index("ends a") < found.index("starts c")
    shares = [line.split()[2:] for line in (folder / "notes.txt").read_text().splitlines()]
    assert {(threads, jobs) for threads, _, jobs, _ in shares} == {("3", "2")}
    assert (folder / "out/logs/x_b.log").read_text().startswith("$ maedistill x/b after=a.begun\n")


@pytest.mark.parametrize(
    ("jobs", "gpus"), [(1, ["GPU-a,GPU-b"] * 4), (2, ["GPU-a", "GPU-b", "GPU-b", "GPU-b"]), (4, ["GPU-a", "GPU-b"] * 2)]
)
def test_jobs_are_dealt_the_gpus_that_are_visible(folder, monkeypatch, jobs, gpus) -> None:
    """The first job outlives the others where it can: what these give back goes to the next, and nobody joins it."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    steps = [step("a", *(["after=d"] if jobs > 1 else [])), step("b"), step("c"), step("d")]
    run(folder, *steps, jobs=jobs)
    lines = [line.split() for line in (folder / "notes.txt").read_text().splitlines()]
    starts = sorted(line[1:] for line in lines if line[0] == "starts")
    assert [gpu for _, _, gpu, *_ in starts] == gpus
    assert {beside for *_, beside in starts} == {"None" if jobs == 1 else str(jobs // 2)}
    command = (folder / "out/logs/b.log").read_text().splitlines()[0]
    assert command == "$ " + ("CUDA_VISIBLE_DEVICES=GPU-b " if jobs > 1 else "") + "maedistill b"


def test_a_failure_holds_back_what_needs_it_and_nothing_else(folder, capfd) -> None:
    steps = [step("a", "fail"), step("b", needs=("a",)), step("c", needs=("b",)), step("d")]
    with pytest.raises(StepsFailed) as raised:
        run_steps(steps, program=PROGRAM, out=folder / "out", jobs=2)
    assert sorted(notes(folder)) == ["ends d", "starts a", "starts d"]
    assert raised.value.exit_code == 1
    assert raised.value.cause == "failed: a (exit code 1); not started for that reason: b, c"
    assert "FAILED a, exit code 1" in (out := capfd.readouterr().out) and "    no luck\n    at all" in out
    assert run(folder, step("a"), *steps[1:])[3:] == ["starts a", "ends a", "starts b", "ends b", "starts c", "ends c"]


def test_an_error_names_a_few_of_the_steps_that_did_not_start(folder) -> None:
    steps = [step("a", "fail"), *(step(f"b{i}", needs=("a",)) for i in range(40))]
    with pytest.raises(StepsFailed) as raised:
        run_steps(steps, program=PROGRAM, out=folder / "out")
    assert raised.value.cause.endswith("not started for that reason: b0, b1, b2, b3, b4 and 35 more")


def test_print_steps_starts_none_and_counts_them(folder, capfd) -> None:
    (folder / "a").touch()
    print_steps([step("a"), step("b", needs=("a",))])
    out = capfd.readouterr().out
    assert "1/2 a: done\n    maedistill a\n2/2 b: to do" in out and out.endswith("\n2 steps: 1 done, 1 to do\n")
    assert not (folder / "notes.txt").exists()


def test_a_folder_that_cannot_be_made_is_refused(folder) -> None:
    (folder / "file").touch()
    with pytest.raises(ConfigError) as raised:
        run_steps([step("a")], program=PROGRAM, out=folder / "file")
    assert "--out" in raised.value.remedy and not (folder / "a").exists()


def test_a_result_without_its_origin_is_refused(folder) -> None:
    (folder / "b").touch()
    with pytest.raises(ConfigError, match="b is done, but a, which it comes from, is not"):
        run(folder, step("a"), step("b", needs=("a",)))
    assert not (folder / "notes.txt").exists()


RUN = """\
import sys
from pathlib import Path
from maedistill.errors import exit_code_of
from maedistill.study.runner import Step, run_steps
steps = [Step("a", ("a", "child", "sleep")), Step("b", ("b",))]
sys.exit(exit_code_of(lambda: run_steps(steps, program=[sys.executable, "tool.py"], out=Path("out"))))
"""


@pytest.mark.faults
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_children_and_theirs(folder, number, code) -> None:
    process = subprocess.Popen([sys.executable, "-c", RUN], stdout=subprocess.DEVNULL)
    wait_until((folder / "sleeps.txt").exists)
    with pytest.raises(ConfigError, match="still running there"):
        run(folder, step("b"))
    process.send_signal(number)
    assert process.wait(timeout=20) == code
    for file in ("sleeps.txt", "child.txt"):
        pid = int((folder / file).read_text())
        wait_until(lambda pid=pid: not lives(pid))
    assert notes(folder) == ["starts a"] and run(folder, step("b")) == ["starts a", "starts b", "ends b"]


@pytest.mark.faults
def test_after_a_kill_nothing_starts_beside_what_was_left_running(folder) -> None:
    process = subprocess.Popen([sys.executable, "-c", RUN], stdout=subprocess.DEVNULL)
    wait_until((folder / "sleeps.txt").exists)
    process.kill()
    process.wait()
    pids = [int((folder / file).read_text()) for file in ("sleeps.txt", "child.txt")]
    with pytest.raises(ConfigError, match="still running there"):
        run(folder, step("b"))
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda pid=pid: not lives(pid))
    assert run(folder, step("b"))[-1] == "ends b"
