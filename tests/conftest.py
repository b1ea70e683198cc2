"""Shared by all tests: one thread per process, tiny shards, and `pretraining` and `finetuning`, which start the tools.

The tiny run: 96 images of 32 px in 4 shards, a ViT of 32 x 2 with 16 patches, 12 samples a step, 8 steps an epoch. It
takes a second or two, so tests share runs where they can.
"""

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
import pytest

# Before anything imports torch or numpy.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # or it starts a pool of processes that import torch

import numpy as np
from filelock import FileLock
from PIL import Image

from maedistill.data.shards.sources import open_folder
from maedistill.data.shards.write import make_shards
from maedistill.errors import exit_code_of
from tests.support.launch import ROOT, Finished, Launcher, Tool
from tests.support.messages import Messages

hypothesis.settings.register_profile("ours", deadline=None)  # by default 200 ms, which a busy machine exceeds
hypothesis.settings.load_profile("ours")

LONGEST = [  # files that run first
    "faults/test_kills.py", "faults/test_signals.py", "test_codistillation.py", "faults/test_elastic.py",
    "faults/test_disk_full.py", "test_pretrain.py",
    "training/test_resume.py", "test_study_tool.py", "test_finetune.py", "test_finetune_distilled.py",
    "processes/test_heartbeat.py", "faults/test_interrupts.py", "faults/test_two_machines.py",
    "processes/test_rendezvous.py", "test_api.py",
]  # fmt: skip
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

# A student from scratch, for this config.
SCRATCH = ["student.model=vit_tiny_patch16_224", "student.width=32", "student.depth=2", "student.num_heads=2"]
SCRATCH += ["student.patch_size=8"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option of `make messages`."""
    parser.addoption("--rewrite-messages", action="store_true", help="write tests/golden/messages.txt anew")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark fault tests, and put the files that take longest first: they then run beside each other, not at the end."""
    for item in items:
        if "faults" in item.path.relative_to(ROOT / "tests").parts or "faults" in item.path.stem:
            item.add_marker("faults")
    places = {str(ROOT / "tests" / file): place for place, file in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(str(item.path), len(LONGEST)))


@pytest.fixture(scope="session")
def messages(request: pytest.FixtureRequest) -> Iterator[Messages]:
    """The golden file of error messages."""
    messages = Messages(rewrite=request.config.getoption("--rewrite-messages"))
    yield messages
    if messages.rewrite:
        messages.write()


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
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all test processes of a session share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "together"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def shards(together: Path) -> Path:
    """train-*.tar with 96 images in 4 shards and val-*.tar with 24: two colours, blended in the class's direction."""
    out = together / "shards"
    with FileLock(f"{out}.lock"):
        if not out.exists():
            write_shards(together / "pictures", out)
    return out


def write_shards(pictures: Path, out: Path) -> None:
    """Draw the images of `shards`."""
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


@pytest.fixture
def run_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., SimpleNamespace]:
    """`maedistill NAME WORDS` in this process: its exit code, and what it printed."""

    def start(name: str, *words: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["maedistill", name, *map(str, words)])
        main = importlib.import_module(f"maedistill.commands.{name}").main
        return SimpleNamespace(code=exit_code_of(main), **capsys.readouterr()._asdict())

    return start


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """Starts programs; see tests/support/launch.py."""
    launcher = Launcher(tmp_path_factory.mktemp("starts"))
    yield launcher
    launcher.close()


@pytest.fixture(scope="session")
def pretraining(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Tool:
    """Starts tools/pretrain.py on the tiny shards; see `Tool.start`."""
    return Tool(launcher, "tools/pretrain.py", CONFIG.format(shards=shards), tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def finetuning(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Tool:
    """Starts tools/finetune.py on the tiny shards; see `Tool.start`."""
    return Tool(launcher, "tools/finetune.py", FINETUNE_CONFIG.format(shards=shards), tmp_path_factory.mktemp("tuned"))


@pytest.fixture(scope="session")
def settings(together: Path) -> dict[str, list[str]]:
    """What the command line of each method adds to the tiny config; the teacher is the run of `mae`."""
    source = f"teacher.source=run:{together}/mae"
    amd = ["masks.teacher_keep_ratio=0.5", "align.student=[0,1]", "align.teacher=[0,1]", "align.distance=mse"]
    amd += ["align.normalize=whiten", "generate.depth=1", "generate.num_heads=2", "optim.ema=0.9"]
    return {
        "mae": ["method=mae"],
        "dmae": ["method=dmae", source, "align.student=[1]", "align.teacher=[1]"],
        "amd": ["method=amd", source, *amd],
    }


def two_at_a_time(start: Callable[[Any], Any], cases: Iterable[Any]) -> dict[Any, Any]:
    """Return {case: start(case)}; two are under way at a time."""
    cases = list(cases)
    with ThreadPoolExecutor(2) as two:
        return dict(zip(cases, two.map(start, cases), strict=True))


def run_once(tool: Tool, path: Path, *arguments: str, **keywords: Any) -> Finished:
    """Start a tool in the run folder `path`, if no test process has; return how it ended."""
    note = Path(f"{path}.json")
    with FileLock(f"{path}.lock"):
        if not note.exists():
            ended = tool(str(path), *arguments, **keywords)
            note.write_text(json.dumps([ended.code, ended.out, ended.err]))
    return Finished(path, *json.loads(note.read_text()))


@pytest.fixture(scope="session")
def mae(pretraining: Tool, settings: dict[str, list[str]], together: Path) -> Finished:
    """A finished MAE run of 5 epochs: the teacher of others, and what fine-tuning starts from."""
    return run_once(pretraining, together / "mae", *settings["mae"], "optim.epochs=5")


@pytest.fixture(scope="session")
def trio(pretraining: Tool, settings: dict[str, list[str]], together: Path, mae: Finished) -> dict[str, Finished]:
    """One finished run of each method: `mae`, and `dmae` and `amd` with it as their teacher. amd has a witness."""
    with ThreadPoolExecutor(2) as two:
        dmae = two.submit(run_once, pretraining, together / "dmae", *settings["dmae"])
        amd = two.submit(run_once, pretraining, together / "amd", *settings["amd"], witness=True)
        return {"mae": mae, "dmae": dmae.result(), "amd": amd.result()}


@pytest.fixture(scope="session")
def tuned(finetuning: Tool, together: Path, mae: Finished) -> Finished:
    """The MAE run fine-tuned, with everything on that is random: one process, ZeRO 0. It has a witness."""
    return run_once(finetuning, together / "tuned", f"init.source=run:{mae.run}", witness=True)
