"""Start programs as a person, a launcher or a job scheduler would, signal them, and read what they came to.

    launcher.start(run, ["tools/pretrain.py", ...], ranks=2, by="torchrun") -> Start -> signal, wait -> Finished

`by`:
    fork       one process per rank from fork_server.py, which has imported everything: the fast way, and the default
    piped      the same, its output through pipes: a limit on the size of files does not reach what it prints
    bare       a new interpreter
    torchrun, deepspeed, slurm
               as these start the ranks; for slurm, one new interpreter per rank with srun's variables
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
WITNESS = "tests/support/witness.py"
TIMEOUT = 180  # seconds that a start may take to end
GRACE = 20  # seconds that the other ranks have to leave by themselves when one is gone
_RANK_VARIABLES = ("SLURM", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")  # prefixes; not inherited from our own launcher


@dataclass
class Finished:
    """How a start ended. With several ranks, `out` and `err` are those of all."""

    run: Path
    code: int
    out: str
    err: str

    def metrics(self) -> list[dict[str, Any]]:
        """Return the records of metrics.jsonl that have losses, checked to be one per step from the first on."""
        steps = [record for record in self.records() if "loss" in record]
        assert [record["step"] for record in steps] == list(range(1, len(steps) + 1))
        return steps

    def records(self) -> list[dict[str, Any]]:
        """Return all records of metrics.jsonl."""
        return [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]

    def last_checkpoint(self) -> Path:
        """Return the folder of the newest checkpoint."""
        return max((self.run / "checkpoints").glob("step_?????????"))


@dataclass
class Start:
    """The processes of one start, rank by rank (or one launcher), and the files that they print to."""

    run: Path
    pids: list[int]
    logs: list[tuple[Path, Path]]  # stdout and stderr of each process
    reap: Callable[[int], int]  # waits for a process that has ended, and returns its exit code
    codes: list[int] | None = None

    def __post_init__(self) -> None:
        self.began = time.monotonic()
        self._ends = [os.pidfd_open(pid) for pid in self.pids]

    def ended(self, timeout: float = 0.0) -> list[int]:
        """Return the ranks that are gone, after waiting so many seconds for the first of them."""
        gone = select.select(self._ends, [], [], timeout)[0]
        return [rank for rank, end in enumerate(self._ends) if end in gone]

    def signal(self, number: int, rank: int = 0) -> None:
        """Send a signal to one rank, if it still lives."""
        signal.pidfd_send_signal(self._ends[rank], number)

    def wait(self, *, grace: float = GRACE, timeout: float = TIMEOUT) -> list[int]:
        """Return exit codes by rank, negative for a signal. Ranks that outlive the first by `grace` s are killed."""
        deadline = time.monotonic() + timeout
        while (gone := self.ended()) != list(range(len(self.pids))):
            if gone and deadline > time.monotonic() + grace:
                deadline = time.monotonic() + grace
            if time.monotonic() > deadline:
                self.kill(gone)
                assert gone, f"still running after {timeout} s\n{self.printed()[-3000:]}"
            time.sleep(0.01)
        self.codes = [self.reap(pid) for pid in self.pids]
        for end in self._ends:
            os.close(end)
        return self.codes

    def kill(self, gone: Sequence[int] = ()) -> None:
        """Kill the ranks that are not in `gone`, with everything that they started."""
        for rank in set(range(len(self.pids))) - set(gone):
            with suppress(ProcessLookupError):
                self.signal(signal.SIGKILL, rank)
            with suppress(ProcessLookupError):  # it has no session of its own yet
                os.killpg(self.pids[rank], signal.SIGKILL)

    def finish(self, code: int | None = 0, *, timeout: float = TIMEOUT) -> Finished:
        """Wait for the end of all ranks. code: what each must exit with; None allows any."""
        codes = self.wait(timeout=timeout)
        assert code is None or set(codes) == {code}, f"exit codes {codes}, expected {code}\n{self.printed()[-4000:]}"
        return Finished(self.run, codes[0], self.out, self.err)

    @property
    def out(self) -> str:
        """Return what all ranks printed to stdout."""
        return "".join(out.read_text() for out, _ in self.logs)

    @property
    def err(self) -> str:
        """Return what all ranks printed to stderr."""
        return "".join(err.read_text() for _, err in self.logs)

    def printed(self) -> str:
        """Return what all ranks printed."""
        return self.out + self.err

    def said(self, rank: int = 0) -> tuple[str, str]:
        """Return what one rank printed to stdout and stderr."""
        out, err = self.logs[rank]
        return out.read_text(), err.read_text()


class Launcher:
    """Starts programs, and the fork server of this test session. folder: for what they print."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        self.starts: list[Start] = []
        self._server: subprocess.Popen | None = None
        self._one_at_a_time = threading.RLock()  # tests start tools from several threads

    @property
    def server(self) -> subprocess.Popen:
        """Return the fork server, started at the first need."""
        if self._server is None:
            quiet = {"OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
            self._server = subprocess.Popen(
                [sys.executable, "-m", "tests.support.fork_server"],
                cwd=ROOT,
                env=_environment(**quiet, TMPDIR=str(self.folder)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,  # it ends when its input does, after its children, and not by a Ctrl-C of ours
            )
        return self._server

    def ask(self, **request: Any) -> int:
        """Return the fork server's answer to one request."""
        with self._one_at_a_time:
            self.server.stdin.write(json.dumps(request) + "\n")
            self.server.stdin.flush()
            answer = self.server.stdout.readline()
        assert answer, "the fork server has ended, and said why on stderr"
        return int(answer)

    def start(self, run: Path, words: Sequence[Any], *, ranks: int = 1, by: str = "fork", **variables: Any) -> Start:
        """Start `python WORDS ...`. run: the run folder, for what is read of it. variables: for the environment."""
        with self._one_at_a_time:
            self.count += 1
            count = self.count
        words, variables = [str(word) for word in words], {name: str(value) for name, value in variables.items()}
        scripts, port = Path(sys.executable).parent, free_port()
        torchrun = [scripts / "torchrun", "--standalone", f"--nproc-per-node={ranks}"]
        deepspeed = [scripts / "deepspeed", f"--num_gpus={ranks}", f"--master_port={port}"]
        forked = [([], rank_variables(rank, ranks, port)) for rank in range(ranks)]
        starts: list[tuple[list[Any], dict[str, str]]] = {
            "fork": forked,
            "piped": forked,
            "bare": [([sys.executable], {})],
            "torchrun": [(torchrun, {})],
            "deepspeed": [(deepspeed, {"DS_ACCELERATOR": "cpu"})],
            "slurm": [([sys.executable], more) for more in slurm_variables(ranks)],
        }[by]
        logs = [
            (self.folder / f"start-{count}-{i}.out", self.folder / f"start-{count}-{i}.err") for i in range(len(starts))
        ]
        if by in ("fork", "piped"):
            copies, pids = [], []
            for files, (_, more) in zip(logs, starts, strict=True):
                if by == "piped":
                    pipes = [Path(f"{file}.pipe") for file in files]
                    for pair in zip(pipes, files, strict=True):
                        os.mkfifo(pair[0])
                        copies.append(threading.Thread(target=_copy_pipe, args=pair, daemon=True))
                        copies[-1].start()
                    files = pipes
                pids.append(self.ask(words=words, out=str(files[0]), err=str(files[1]), variables=variables | more))

            def collect(pid: int) -> int:
                code = self.ask(wait=pid)
                for copy in copies:
                    copy.join(TIMEOUT)
                return code

            return self._noted(Start(run, pids, logs, collect))
        processes = {}
        for files, (prefix, more) in zip(logs, starts, strict=True):
            process = subprocess.Popen(
                [*map(str, prefix), *words],
                cwd=ROOT,
                env=_environment(TMPDIR=str(self.folder), **more) | variables,  # torchrun leaves a folder there
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
            # Pipes, not the files themselves: a limit on the size of files must not reach what a process prints.
            copies = [
                threading.Thread(target=_copy, args=pair, daemon=True)
                for pair in zip((process.stdout, process.stderr), files, strict=True)
            ]
            for copy in copies:
                copy.start()
            processes[process.pid] = process, copies

        def reap(pid: int) -> int:
            process, copies = processes[pid]
            for copy in copies:
                copy.join(TIMEOUT)
            return process.wait()

        return self._noted(Start(run, list(processes), logs, reap))

    def start_text(self, folder: Path, program: str, *words: Any, ranks: int = 1, **variables: Any) -> Start:
        """Start a program that is a text, by fork."""
        file = folder / f"program-{self.count}.py"
        file.write_text(program)
        return self.start(folder, [file, *words], ranks=ranks, **variables)

    def _noted(self, start: Start) -> Start:
        self.starts.append(start)
        return start

    def close(self) -> None:
        """End the fork server and every start that nobody has waited for."""
        for start in self.starts:
            if start.codes is None:
                start.kill()
        if self._server is not None:
            self._server.stdin.close()
            self._server.wait(TIMEOUT)
            self._server.stdout.close()


class Tool:
    """Starts `python TOOL CONFIG run=RUN ...` with a tiny config, by a `Launcher`."""

    def __init__(self, launcher: Launcher, tool: str, config: str, folder: Path) -> None:
        self.launcher, self.tool, self.folder, self.config = launcher, tool, folder, folder / "tiny.yaml"
        self.config.write_text(config)

    def start(
        self, run: str, *arguments: Any, ranks: int = 1, launcher: str = "fork", witness: bool = False, **variables: Any
    ) -> Start:
        """Start a run in the folder `run`. arguments: overrides and flags.

        witness: let witness.py start the tool, which notes in the run folder what the network was given.
        """
        path = self.folder / run
        words = [*([WITNESS] if witness else []), self.tool, self.config, f"run={path}", *arguments]
        return self.launcher.start(path, words, ranks=ranks, by=launcher, **variables)

    def __call__(self, run: str, *arguments: Any, code: int | None = 0, **keywords: Any) -> Finished:
        """Start a run and wait for its end with `code`."""
        return self.start(run, *arguments, **keywords).finish(code)


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_variables(rank: int, ranks: int, port: int) -> dict[str, str]:
    """Return what torchrun would set for one rank of one machine; nothing for a process that is alone."""
    if ranks == 1:
        return {}
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    return {name: str(value) for name, value in {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items()}


def slurm_variables(ranks: int) -> list[dict[str, str]]:
    """Return what srun would set for each task. The job's number chooses the port: take one whose port is free."""
    with socket.socket() as probe:
        while True:
            job = int.from_bytes(os.urandom(2), "little") % 20000
            try:
                probe.bind(("127.0.0.1", 20000 + job))
                break
            except OSError:
                continue
    shared = {"SLURM_NTASKS": str(ranks), "SLURM_STEP_ID": "0", "SLURM_JOB_NODELIST": "localhost"}
    shared["SLURM_JOB_ID"] = str(40000 + job)
    return [shared | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(ranks)]


def _copy(source: IO[bytes], file: Path) -> None:
    """Copy what a process prints to a file, as it comes."""
    with source, file.open("wb", buffering=0) as target:
        while data := source.read1():
            target.write(data)


def _copy_pipe(pipe: Path, file: Path) -> None:
    """Wait for a process that opens the pipe, then copy."""
    _copy(pipe.open("rb"), file)


def _environment(**more: str) -> dict[str, str]:
    """Return our environment without the variables of a launcher, one thread per process."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith(_RANK_VARIABLES)}
    return outside | {"OMP_NUM_THREADS": "1"} | more
