"""Shared by all tests: one thread per process, tiny shards, and `pretraining` and `finetuning`, which start the tools.

The tiny run: 96 images of 32 px in 4 shards, a ViT of 32 x 2 with 16 patches, 12 samples a step, 8 steps an epoch. It
takes a second or two; starting its process takes four (torch, timm, DeepSpeed), so tests share runs where they can.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from maedistill.data.shards.sources import open_folder
from maedistill.data.shards.write import make_shards

os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 180
CONFIG = """\
data:
  train: {shards}/train-*.tar
  val: {shards}/val-*.tar
  image_size: 32
  mean: [0.5, 0.5, 0.5]
  std: [0.25, 0.25, 0.25]
  eval_crop: 1.0
  workers: 0
student: {{model: vit_tiny_patch16_224, width: 32, depth: 2, num_heads: 2, patch_size: 8}}
decoder: {{width: 16, depth: 1, num_heads: 2}}
optim: {{epochs: 3, warmup_epochs: 0.5, global_batch: 12, lr: 3e-3}}
engine: {{micro_batch: 12}}
log: {{every_steps: 1, pictures_every_epochs: 2, knn_every_epochs: 2, knn_images: 95, save_every_epochs: 1}}
"""
# Everything random is on: RandAugment, erasing, mixup, cutmix, drop path; and a moving average, and accumulation.
FINETUNE_CONFIG = """\
data:
  train: {shards}/train-*.tar
  val: {shards}/val-*.tar
  image_size: 32
  eval_crop: 1.0
  workers: 0
student: {{drop_path: 0.2}}
augment: {{rand_augment: rand-m9-mstd0.5-inc1, mixup: 0.8, cutmix: 1.0, erasing: 0.5, smoothing: 0.1}}
optim: {{epochs: 3, warmup_epochs: 0.5, global_batch: 12, lr: 3e-3, layer_decay: 0.5, ema: 0.9}}
engine: {{micro_batch: 6}}
log: {{every_steps: 1, eval_every_epochs: 1, save_every_epochs: 1}}
"""


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real images that the developers have beside the checkout; users do not."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs real images in ../shared, which only the developers' checkouts have")
    return folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train-*.tar with 96 images in 4 shards and val-*.tar with 24: two colours, blended in the class's direction."""
    pictures, out = tmp_path_factory.mktemp("pictures"), tmp_path_factory.mktemp("data") / "shards"
    draws = np.random.default_rng(0)
    row, column = np.mgrid[0:32, 0:32] / 31
    for split, count in (("train", 96), ("val", 24)):
        for i in range(count):
            blend = (row, column, (row + column) / 2)[i % 3][..., None]  # [32, 32, 1]
            one, other = draws.uniform(0, 255, (2, 3))
            pixels = one * blend + other * (1 - blend) + draws.normal(0, 4, (32, 32, 3))
            file = pictures / split / "abc"[i % 3] / f"{i:03d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file)
    make_shards(open_folder(pictures), out, images_per_shard=24)
    return out


@dataclass
class Finished:
    """How a start ended. With a launcher, `out` and `err` are those of all ranks."""

    run: Path
    code: int
    out: str
    err: str

    def metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl that have losses, checked to be one per step from the first on."""
        steps = [record for record in self.records() if "loss" in record]
        assert [record["step"] for record in steps] == list(range(1, len(steps) + 1))
        return steps

    def records(self) -> list[dict[str, Any]]:
        """All records of metrics.jsonl."""
        return [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]

    def last_checkpoint(self) -> Path:
        """The folder of the newest checkpoint."""
        return max((self.run / "checkpoints").glob("step_?????????"))


@dataclass
class Started:
    """The processes of one start, not yet waited for."""

    run: Path
    processes: list[subprocess.Popen]

    def finish(self, code: int = 0) -> Finished:
        """Waits for all of them and checks the exit code; what is left after a time-out is killed."""
        try:
            texts = [process.communicate(timeout=TIMEOUT) for process in self.processes]
        finally:
            for process in self.processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        out, err = ("".join(part) for part in zip(*texts, strict=True))
        codes = {process.returncode for process in self.processes}
        assert codes == {code}, f"exit code {codes}, expected {code}\n{out[-2000:]}\n{err[-4000:]}"
        return Finished(self.run, code, out, err)


class Tool:
    """Starts `python TOOL CONFIG ...` with a tiny config, as a person or a launcher would."""

    def __init__(self, tool: str, config: str, folder: Path) -> None:
        self.tool, self.folder, self.config = tool, folder, folder / "tiny.yaml"
        self.config.write_text(config)

    def start(
        self, run: str, *arguments: str, ranks: int = 1, launcher: str = "bare", witness: bool = False, **variables: str
    ) -> Started:
        """Starts a run in the folder `run`; `arguments` are overrides and flags, `variables` go to the environment.

        launcher: bare, torchrun, deepspeed or slurm. witness: let witness.py start the tool, which notes in the run
        folder what the network was given.
        """
        path = self.folder / run
        observer = ["tests/witness.py"] if witness else []
        command = [*observer, self.tool, str(self.config), f"run={path}", *arguments]
        scripts, port = Path(sys.executable).parent, free_port()
        torchrun = [scripts / "torchrun", "--standalone", f"--nproc-per-node={ranks}"]
        deepspeed = [scripts / "deepspeed", f"--num_gpus={ranks}", f"--master_port={port}"]
        starts = {
            "bare": [([sys.executable], {})],
            "torchrun": [(torchrun, {})],
            "deepspeed": [(deepspeed, {"DS_ACCELERATOR": "cpu"})],
            "slurm": [([sys.executable], slurm_variables(rank, ranks, port)) for rank in range(ranks)],
        }[launcher]
        outside = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "RANK", "WORLD_SIZE", "LOCAL_"))}
        processes = [
            subprocess.Popen(
                [*map(str, words), *command],
                cwd=ROOT,
                env=outside | {"OMP_NUM_THREADS": "1"} | more | variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            for words, more in starts
        ]
        return Started(path, processes)

    def __call__(self, run: str, *arguments: str, code: int = 0, **keywords: Any) -> Finished:
        """Starts a run and waits for it to end with `code`."""
        return self.start(run, *arguments, **keywords).finish(code)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def slurm_variables(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What srun sets for one task; the port is given, so that two tests on a machine never meet."""
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_JOB_NODELIST": "localhost", "MASTER_PORT": str(port)}
    return step | {"SLURM_NTASKS": str(ranks), "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}


@pytest.fixture(scope="session")
def pretraining(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Tool:
    """Starts tools/pretrain.py on the tiny shards; see `Tool.start`."""
    return Tool("tools/pretrain.py", CONFIG.format(shards=shards), tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def finetuning(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Tool:
    """Starts tools/finetune.py on the tiny shards; see `Tool.start`."""
    return Tool("tools/finetune.py", FINETUNE_CONFIG.format(shards=shards), tmp_path_factory.mktemp("tuned"))


@pytest.fixture(scope="session")
def settings(pretraining: Tool) -> dict[str, list[str]]:
    """What the command line of each method adds to the tiny config; the teacher is the run of `mae`."""
    source = f"teacher.source=run:{pretraining.folder}/mae"
    amd = ["masks.teacher_keep_ratio=0.5", "align.student=[0,1]", "align.teacher=[0,1]", "align.distance=mse"]
    amd += ["align.normalize=whiten", "generate.depth=1", "generate.num_heads=2", "optim.ema=0.9"]
    return {
        "mae": ["method=mae"],
        "dmae": ["method=dmae", source, "align.student=[1]", "align.teacher=[1]"],
        "amd": ["method=amd", source, *amd],
    }


@pytest.fixture(scope="session")
def mae(pretraining: Tool, settings: dict[str, list[str]]) -> Finished:
    """A finished MAE run of 5 epochs: the teacher of others, and what fine-tuning starts from."""
    return pretraining("mae", *settings["mae"], "optim.epochs=5")


@pytest.fixture(scope="session")
def trio(pretraining: Tool, settings: dict[str, list[str]], mae: Finished) -> dict[str, Finished]:
    """One finished run of each method: `mae`, and `dmae` and `amd` with it as their teacher. amd has a witness."""
    with ThreadPoolExecutor(2) as two:
        dmae = two.submit(pretraining, "dmae", *settings["dmae"])
        amd = two.submit(pretraining, "amd", *settings["amd"], witness=True)
        return {"mae": mae, "dmae": dmae.result(), "amd": amd.result()}


@pytest.fixture(scope="session")
def tuned(finetuning: Tool, mae: Finished) -> Finished:
    """The MAE run fine-tuned, with everything on that is random: one process, ZeRO 0. It has a witness."""
    return finetuning("tuned", f"init.source=run:{mae.run}", witness=True)
