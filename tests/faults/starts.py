"""Starts of a tool that may be killed: `Forks` talks to fork_server.py, `Start` is the processes of one start.

    forks.start(run, tool, arguments, ranks=2) -> Start -> kill, wait -> exit codes

Each rank is a process of its own, found by the variables that torchrun sets; there is no launcher that would end the
others when one is gone: `Start.wait` does what a launcher does, a while later.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMEOUT = 180  # seconds that a start may take to end
GRACE = 20  # seconds that the others have to leave by themselves when one rank is gone


class Forks:
    """A fork server of this test session, and the folder where its processes write what they print."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        own = ("SLURM", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")
        outside = {name: value for name, value in os.environ.items() if not name.startswith(own)}
        quiet = {
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "DS_ACCELERATOR": "cpu",
        }
        self.server = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("fork_server.py")],
            env=outside | quiet | {"TMPDIR": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # it ends when its input does, after its children, and not by a Ctrl-C of ours
        )

    def ask(self, **request: Any) -> int:
        """The server's answer to one request."""
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        answer = self.server.stdout.readline()
        assert answer, "the fork server has ended, and said why on stderr"
        return int(answer)

    def start(self, run: Path, *words: Any, ranks: int = 1, witness: bool = False, **variables: Any) -> "Start":
        """Starts `python WORDS ... run=RUN` on so many ranks; `variables` go to their environment.

        witness: let tests/witness.py start the tool, which notes in the run folder what the network was given.
        """
        self.count += 1
        observer = ["tests/witness.py"] if witness else []
        words = [*observer, *map(str, words), f"run={run}"]
        variables = {name: str(value) for name, value in variables.items()}
        logs = [self.folder / f"start-{self.count}-rank-{rank}.log" for rank in range(ranks)]
        port = free_port()
        pids = [
            self.ask(words=words, log=str(log), variables=variables | rank_variables(rank, ranks, port))
            for rank, log in enumerate(logs)
        ]
        return Start(self, run, pids, logs)

    def close(self) -> None:
        """Ends the server and whatever it started."""
        self.server.stdin.close()
        self.server.wait(TIMEOUT)
        self.server.stdout.close()


@dataclass
class Start:
    """The processes of one start, rank by rank, and the files that they print to."""

    forks: Forks
    run: Path
    pids: list[int]
    logs: list[Path]
    codes: list[int] | None = None

    def __post_init__(self) -> None:
        self.began = time.monotonic()
        self.ends = [os.pidfd_open(pid) for pid in self.pids]

    def ended(self, timeout: float = 0.0) -> list[int]:
        """Ranks that are gone, after waiting so many seconds for the first of them."""
        gone = select.select(self.ends, [], [], timeout)[0]
        return [rank for rank, end in enumerate(self.ends) if end in gone]

    def signal(self, number: int, rank: int = 0) -> None:
        """Sends a signal to one rank, if it still lives."""
        signal.pidfd_send_signal(self.ends[rank], number)

    def wait(self, *, grace: float = GRACE, timeout: float = TIMEOUT) -> list[int]:
        """Exit codes by rank, negative for a signal. Ranks that stay `grace` seconds after the first are killed."""
        deadline = time.monotonic() + timeout
        while (gone := self.ended()) != list(range(len(self.pids))):
            if gone and deadline > time.monotonic() + grace:
                deadline = time.monotonic() + grace
            if time.monotonic() > deadline:
                self.end(gone)
                assert gone, f"still running after {timeout} s\n{self.printed()[-3000:]}"
            time.sleep(0.01)
        self.codes = [self.forks.ask(wait=pid) for pid in self.pids]
        for end in self.ends:
            os.close(end)
        return self.codes

    def end(self, gone: list[int]) -> None:
        """Kills the ranks that are not in `gone`."""
        for rank in set(range(len(self.pids))) - set(gone):
            self.signal(signal.SIGKILL, rank)

    def finish(self, code: int = 0) -> str:
        """Waits for an end with `code` on all ranks; returns what they printed."""
        codes = self.wait()
        assert set(codes) == {code}, f"exit codes {codes}, expected {code}\n{self.printed()[-3000:]}"
        return self.printed()

    def printed(self) -> str:
        """What all ranks printed."""
        return "".join(log.read_text() for log in self.logs)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_variables(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun would set for one rank of one machine."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    return {name: str(value) for name, value in {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items()}
