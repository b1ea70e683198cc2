"""Starts a scenario of scenarios.py on real processes, as each launcher would, and checks how they start and leave."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

SCENARIOS = Path(__file__).with_name("scenarios.py")
TIMEOUT = 600  # seconds: on a busy machine too, it only ends what hangs


def run_scenario(name: str, folder: Path, *, ranks: int, launcher: str = "bare") -> list[Any]:
    """What `name` returned on each rank. The machine has no compiler and no ninja, and stdout must stay ours."""
    extensions = folder / "extensions"
    nothing = folder / "bin"
    nothing.mkdir(exist_ok=True)
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE") and not k.startswith("SLURM")}
    environment = inherited | {"PATH": str(nothing), "TORCH_EXTENSIONS_DIR": str(extensions), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCENARIOS), name, str(folder)]
    if launcher == "torchrun":
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        starts = [(torchrun + command[1:], environment)]
    elif launcher == "slurm":
        starts = [(command, environment | variables) for variables in slurm_variables(ranks)]
    else:
        starts = [(command, environment)]
    processes = [
        subprocess.Popen(c, env=e, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
        for c, e in starts
    ]
    try:
        for process in processes:
            out, err = process.communicate(timeout=TIMEOUT)
            assert process.returncode == 0, err[-3000:]
            assert out == "", f"something printed to stdout: {out}"
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert not extensions.exists(), "DeepSpeed compiled something"
    return [torch.load(folder / f"{name}-{rank}.pt", weights_only=False) for rank in range(ranks)]


def slurm_variables(ranks: int) -> list[dict[str, str]]:
    """What srun would set, on this machine. The job's number chooses the port: take one whose port is free."""
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
