"""Bad and hostile inputs, end to end: each gives its exit code, one line of cause and one of remedy, and nothing else.

Every case of bad_inputs.py makes its files in a folder of its own, goes there and starts a tool with a command line, in
this process: training up to where the engine would be built and a first batch has been read. A case may take 60 s and
2 GB. Whatever could run code would create a folder beside the cases, and what lies around them must stay as it is.
"""

import contextlib
import io
import os
import pickle
import resource
import runpy
import shlex
import signal
import sys
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml

from maedistill.config.finetune import FinetuneConfig
from maedistill.config.loader import load_config
from maedistill.config.pretrain import PretrainConfig
from maedistill.data.shards.open_index import open_index
from maedistill.finetuning.build import build_labelled_crops
from maedistill.finetuning.setup import open_finetuning
from maedistill.pretraining.build import build_crops
from maedistill.pretraining.setup import open_pretraining
from maedistill.runs.folder import RunFolder
from maedistill.runs.restore import load_latest
from tests.faults import corpus
from tests.faults.bad_inputs import CASES

SECONDS, MEMORY = 60, 2 << 30  # that one case may take
CPU = torch.device("cpu")
PRETRAIN = """\
method: mae
run: run
data: {{train: "{good}/shards/train-*.tar", image_size: 32, mean: [0.5, 0.5, 0.5], std: [0.25, 0.25, 0.25], workers: 0}}
student: {{model: vit_tiny_patch16_224, width: 32, depth: 2, num_heads: 2, patch_size: 8}}
decoder: {{width: 16, depth: 1, num_heads: 2}}
optim: {{epochs: 3, warmup_epochs: 0.5, global_batch: 12, lr: 3e-3}}
"""
FINETUNE = """\
init: {{source: "run:{good}/mae"}}
run: run
data: {{train: "{good}/shards/train-*.tar", val: "{good}/shards/val-*.tar", image_size: 32, workers: 0}}
optim: {{epochs: 3, warmup_epochs: 0.5, global_batch: 12, lr: 3e-3}}
augment: {{mixup: 0, cutmix: 0}}
"""


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """Good shards, configs and runs of both stages; beside it lie the cases and, if it comes, the canary."""
    folder = tmp_path_factory.mktemp("world") / "good"
    (folder / "shards").mkdir(parents=True)
    (folder.parent / "cases").mkdir()
    for name, count in (("train-000000", 24), ("train-000001", 24), ("val-000000", 12)):
        (folder / "shards" / f"{name}.tar").write_bytes(corpus.tar(corpus.samples(count)))
    for split in ("train", "val"):
        open_index(f"{folder}/shards/{split}-*.tar")
    stages = {
        "mae": ("pretrain.yaml", PRETRAIN, PretrainConfig, open_pretraining),
        "tuned": ("finetune.yaml", FINETUNE, FinetuneConfig, open_finetuning),
    }
    for run, (file, text, root, open_parts) in stages.items():
        (folder / file).write_text(text.format(good=folder))
        config = load_config(folder / file, root=root).config
        corpus.imitated_run(open_parts(config, world_size=1, device=CPU), folder / run)
    return folder


def begin(config: Any, *, fresh: bool, extend: bool, open_parts: Callable[..., Any]) -> None:
    """What a start does up to its first batch, but for the process group and the engine."""
    folder = RunFolder(config.run)
    with folder.recorded_end():
        parts = open_parts(config, world_size=1, device=CPU)
        folder.open(config, parts.metadata, execution={}, fresh=fresh, extend=extend)
        shapes = {name: tuple(value.shape) for name, value in parts.module.state_dict().items()}
        engine = SimpleNamespace(module=parts.module, shapes=lambda: shapes, load_state=lambda state: None)
        load_latest(folder.checkpoints, engine)
        if isinstance(config, FinetuneConfig):
            crops = build_labelled_crops(config, parts.index, parts.samples, mean=parts.mean)
        else:
            crops = build_crops(config, parts.index)
        print("bad samples:", *crops.__getitems__(list(range(len(parts.index)))).bad or ["none"])


class TooLong(BaseException):
    """No `except` on the way takes it for an error of reading."""


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """An end to what has none: SECONDS on the clock, and MEMORY beyond what this process has."""

    def stop(*_: Any) -> None:
        raise TooLong(f"more than {SECONDS} s")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture
def start(root, good, monkeypatch) -> Iterator[Callable[[str], tuple[int, str, str]]]:
    """Starts a tool by its command line in the working directory: exit code, stdout, stderr."""
    for wing, name, open_parts in (
        ("pretraining", "pretrain", open_pretraining),
        ("finetuning", "finetune", open_finetuning),
    ):
        stub = SimpleNamespace(**{name: partial(begin, open_parts=open_parts)})
        monkeypatch.setitem(sys.modules, f"maedistill.{wing}.loop", stub)
    monkeypatch.setenv("XDG_CACHE_HOME", str(good.parent / "cache"))
    monkeypatch.setenv("HOME", str(good.parent / "home"))
    leave, here = os._exit, os.getpid()  # how a tool ends that is done; loader workers still may
    monkeypatch.setattr(os, "_exit", lambda code: sys.exit(code) if os.getpid() == here else leave(code))
    environment, out, err = dict(os.environ), io.StringIO(), io.StringIO()

    def run(command: str) -> tuple[int, str, str]:
        words = shlex.split(command.format(good=good))
        monkeypatch.setattr(sys, "argv", words)
        with (
            pytest.raises(SystemExit) as end,
            limits(),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            runpy.run_path(str(root / "tools" / f"{words[0]}.py"), run_name="__main__")
        return end.value.code, out.getvalue(), err.getvalue()

    yield run
    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def case(request, good, monkeypatch) -> Any:
    """One case, its files made, in its folder."""
    found = CASES[request.param]
    folder = good.parent / "cases" / f"{list(CASES).index(request.param):03d}"
    folder.mkdir()
    for name, content in found.files.items():
        corpus.write(folder / name, content, good)
    monkeypatch.chdir(folder)
    return found


def tree(folder: Path) -> dict[Path, tuple[int, ...]]:
    """Every file and folder below, links not followed, with what changes when somebody writes to it."""
    states = {path: path.lstat() for path in folder.rglob("*")}
    return {
        path: (state.st_ino, state.st_mode, *((state.st_size, state.st_mtime_ns) if not path.is_dir() else ()))
        for path, state in states.items()
    }


@pytest.mark.filterwarnings("ignore:Validating sparse tensor:UserWarning")
@pytest.mark.parametrize("case", CASES, indirect=True)
def test_how_it_ends(case, start, good):
    here, before = Path.cwd(), tree(good.parent)
    code, out, err = start(case.command)
    lines = err.replace("\r", "\n").splitlines()
    errors, fixes = ([line for line in lines if line.startswith(word)] for word in ("error: ", "  fix: "))
    if case.code == 0:
        assert (code, errors, fixes) == (0, [], []), err
        assert (out + err).count(case.cause) == 1, out + err
    else:
        assert (code, len(errors), len(fixes)) == (case.code, 1, 1), err
        assert case.cause in errors[0] and case.remedy in fixes[0] and "Traceback" not in err, err
        assert max(map(len, errors + fixes)) < 10_000 and (errors[0] + fixes[0]).isprintable()
    words = {word.removeprefix("run=") for word in shlex.split(case.command)} | {"run"}
    after = tree(good.parent)
    for path in before.keys() | after.keys():
        place = path.relative_to(good.parent).parts
        mine = len(place) > 2 and path.is_relative_to(here)
        new = path not in before and mine and (place[2] in words or path.name.endswith(".index.safetensors"))
        continued = mine and f"run={place[2]}" in case.command
        assert new or continued or place[0] == "cache" or before.get(path) == after.get(path), f"{path} was written to"


def test_nothing_of_them_ran_and_their_number_is_the_documented_one(root, good):
    assert (root / "docs/promises.md").read_text().count(f"{len(CASES)} named inputs") == 2
    assert {path.name for path in good.parent.iterdir()} <= {"good", "cases", "cache"}


def unpickle(file: str, member: str | None = None) -> None:
    """What `pickle.load` does, also to a member of a tar."""
    if member is None:
        pickle.loads(Path(file).read_bytes())
    else:
        with tarfile.open(file) as tar:
            pickle.loads(tar.extractfile(member).read())


# What a careless reader would do with hostile files of the table.
CARELESS: dict[str, Callable[[], object]] = {
    "config: a tag that runs a command": lambda: yaml.unsafe_load(Path("bad.yaml").read_text()),
    "pattern: a pipe": lambda: os.system(f"mkdir {corpus.CANARY}"),
    "tar: a pickle and a .pyd among images": lambda: unpickle("bad.tar", "a.pkl"),
    "label: a pickle": lambda: unpickle("bad.tar", "000.cls"),
    "image: a pickle": lambda: unpickle("bad.tar", "000.png"),
    "index: a pickle": lambda: unpickle("bad.index.safetensors"),
    "weights: a pickle that runs code": lambda: torch.load("bad.pth", weights_only=False),
    "weights: an old pickle that runs code": lambda: torch.load("bad.pth", weights_only=False),
    "weights: a bare pickle that runs code": lambda: unpickle("bad.pth"),
    "weights: timm's folder with a pickle": lambda: torch.load("bad/pytorch_model.bin", weights_only=False),
    "checkpoint: a pickle as moments": lambda: unpickle("bad/checkpoints/step_000000001/optimizer.safetensors"),
}


@pytest.mark.parametrize("name", CARELESS)
def test_hostile_files_are_what_they_seem(name, good, tmp_path, monkeypatch):
    """Where one lets them, they do create the canary: that there was none says something."""
    (tmp_path / "cases" / "one").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "cases" / "one")
    for file, content in CASES[name].files.items():
        corpus.write(Path(file), content, good)
    assert name != "pattern: a pipe" or f"pipe:mkdir {corpus.CANARY}" in CASES[name].command
    CARELESS[name]()
    assert (tmp_path / "canary").is_dir()
