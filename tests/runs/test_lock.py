"""A run folder has one owner at a time, and a dead owner holds nothing."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from maedistill.errors import ConfigError
from maedistill.runs.lock import FolderLock
from tests.support.forked import exit_code, fork

# Takes the lock, starts a child by fork that outlives it (as a loader worker may), says so and waits.
OWNER = """
import os, sys, time
from pathlib import Path
from maedistill.runs.lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
child = os.fork()
if child == 0:
    time.sleep(30)
    os._exit(0)
print(child, flush=True)
time.sleep(30)
"""


@pytest.fixture
def owner(tmp_path: Path):
    process = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    yield process
    process.stdout.close()
    process.kill()
    process.wait()
    os.kill(child, signal.SIGKILL)


def test_the_second_is_refused_and_told_by_whom(tmp_path, owner):
    for _ in range(2):  # looking does not take it away
        with pytest.raises(ConfigError, match=f"is in use by process {owner.pid} on ") as refused:
            FolderLock(tmp_path)
    assert "another folder" in refused.value.remedy


def test_a_killed_owner_frees_it_though_its_child_lives(tmp_path, owner):
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    FolderLock(tmp_path).release()
    assert (tmp_path / "lock").read_text() == f"process {os.getpid()} on {os.uname().nodename}\n"


def test_released_it_is_free_for_other_processes(tmp_path):
    FolderLock(tmp_path).release()
    assert exit_code(fork(lambda: FolderLock(tmp_path).release())) == 0
