"""Start the training tools in separate processes, on the GPU or the CPU; let them finish, stop them or kill them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gpu_parts.check import ROOT, TIME_UP, Check
from maedistill.errors import Preempted
from maedistill.runs.history import read_metrics

PRETRAIN = """\
data: {{train: '{shards}/train-*.tar', val: '{shards}/val-*.tar', image_size: 32, eval_crop: 1.0, workers: 1,
  mean: [0.5, 0.5, 0.5], std: [0.25, 0.25, 0.25]}}
student: {{model: vit_tiny_patch16_224, width: 32, depth: 2, num_heads: 2, patch_size: 8}}
decoder: {{width: 16, depth: 1, num_heads: 2}}
optim: {{epochs: 4, warmup_epochs: 0.5, global_batch: 12, lr: 3e-3}}
engine: {{micro_batch: 12, precision: fp32, compile: false}}
log: {{every_steps: 1, save_every_epochs: 1, pictures_every_epochs: null, knn_every_epochs: null, trackers: []}}
"""
# No drop path: it draws on the device, and a GPU draws other numbers than a CPU.
FINETUNE = """\
data: {{train: '{shards}/train-*.tar', val: '{shards}/val-*.tar', image_size: 32, eval_crop: 1.0, workers: 1}}
student: {{model: vit_tiny_patch16_224, width: 32, depth: 2, num_heads: 2, patch_size: 8, register_tokens: 1,
          drop_path: 0}}
augment: {{rand_augment: rand-m9-mstd0.5-inc1, mixup: 0.8, cutmix: 1.0, erasing: 0, smoothing: 0.1}}
optim: {{epochs: 2, warmup_epochs: 0.5, global_batch: 12, lr: 1e-3, ema: 0.9}}
engine: {{micro_batch: 6, precision: fp32, compile: false}}
log: {{every_steps: 1, eval_every_epochs: 1, save_every_epochs: 1, trackers: []}}
"""
_PAUSE = 0.01


@dataclass
class Starts:
    """Runs of the tools on tiny shards: 8 steps per epoch, and a checkpoint after each epoch."""

    check: Check
    shards: Path

    def __post_init__(self) -> None:
        self.folder = self.check.work / self.check.part
        self.folder.mkdir(exist_ok=True)
        self.cut = set[str]()  # runs that were killed because the time of the part was up
        for tool, text in (("pretrain", PRETRAIN), ("finetune", FINETUNE)):
            (self.folder / f"{tool}.yaml").write_text(text.format(shards=self.shards))

    def run(self, name: str) -> Path:
        """Return a run's folder."""
        return self.folder / name

    def whole(self, name: str, *settings: str, tool: str = "pretrain", cpu: bool = False) -> None:
        """Run to the end; record a row only if the run fails, or if no time is left."""
        code = self._wait(name, self._start(name, settings, tool=tool, cpu=cpu))
        if code not in (0, None):
            self.check.verdict(f"{name}: runs", False, self._why(name, code))

    def stopped(self, name: str, *settings: str) -> None:
        """Send SIGTERM in the middle of an epoch, then resume the run to its end."""
        process = self._start(name, settings)
        if not self._until(name, process, lambda: len(_records(self.run(name))) > 2):
            return
        process.send_signal(signal.SIGTERM)
        code = self._wait(name, process)
        if code is None:
            return
        if code == 0:
            self.check.skipped(f"{name}: saves and leaves", "it had finished before the signal came")
        else:
            good = code == Preempted("SIGTERM", 0).exit_code
            self.check.verdict(f"{name}: saves and leaves", good, self._why(name, code) if not good else "exit code 75")
        self.whole(name, *settings)

    def killed(self, name: str, *settings: str) -> None:
        """Send SIGKILL after the first checkpoint, then resume the run to its end."""
        process = self._start(name, settings)
        if not self._until(name, process, lambda: any(self.run(name).glob("checkpoints/step_*/COMPLETE"))):
            return
        process.kill()
        code = process.wait()
        if code == 0:
            self.check.skipped(f"{name}: is killed", "it had finished before the signal came")
        else:
            self.check.verdict(f"{name}: is killed", code == -signal.SIGKILL, f"exit code {code}")
        self.whole(name, *settings)

    def losses(self, name: str) -> dict[int, float]:
        """Read the loss of every step."""
        return {record["step"]: record["loss"] for record in _records(self.run(name))}

    def _start(
        self, name: str, settings: tuple[str, ...], *, tool: str = "pretrain", cpu: bool = False
    ) -> subprocess.Popen:
        """Start a run; its output goes to a log."""
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if cpu else {}
        command = [f"tools/{tool}.py", str(self.folder / f"{tool}.yaml"), f"run={self.run(name)}", *settings]
        with self._log(name).open("a") as log:
            return subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, env=os.environ | hidden, stdout=log, stderr=subprocess.STDOUT
            )

    def _wait(self, name: str, process: subprocess.Popen) -> int | None:
        """Return the exit code of a run. If this part has no time left, kill the run, record that and return None."""
        try:
            return process.wait(timeout=max(1.0, self.check.left))
        except subprocess.TimeoutExpired:
            self._cut(name, process)
            return None

    def _until(self, name: str, process: subprocess.Popen, seen: Callable[[], bool]) -> bool:
        """Wait until `seen` returns True or the run has ended. If no time is left, end as `_wait` and return False."""
        while process.poll() is None and not seen():
            if self.check.left <= 0:
                self._cut(name, process)
                return False
            time.sleep(_PAUSE)
        return True

    def _cut(self, name: str, process: subprocess.Popen) -> None:
        """Kill a run because this part has no time left, and record that."""
        process.kill()
        process.wait()
        self.cut.add(name)
        self.check.skipped(f"{name}: runs", TIME_UP)

    def _log(self, name: str) -> Path:
        return self.check.log(f"{self.check.part}_{name}.log")

    def _why(self, name: str, code: int | None) -> str:
        """Return how a run ended, with the last lines of its log."""
        words = " | ".join(self._log(name).read_text(errors="replace").strip().splitlines()[-2:])
        return f"exit code {code}: {words[-300:]}"


def _records(run: Path) -> list[dict]:
    """Read the lines of metrics.jsonl that have a loss."""
    return [record for record in read_metrics(run) if "loss" in record]
