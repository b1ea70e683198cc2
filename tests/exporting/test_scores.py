"""Shards that a run is scored on: members and EXIF as in its training, mistakes before any work."""

import io
import json
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from maedistill.evaluation import exits
from maedistill.evaluation.context import EvalContext
from maedistill.exporting import folder as module
from maedistill.weights.from_run import run_members
from maedistill.weights.open_network import open_network
from tests.exporting.imitation import imitate, random_vit


def shard(path: Path, *, label: int = 1) -> Path:
    """Six samples, of which each has two images and the label under a name of its own."""
    with tarfile.open(path, "w") as tar:
        for i in range(6):
            pixels = np.random.default_rng(i).integers(0, 256, (40, 60, 3), dtype=np.uint8)
            encoded = io.BytesIO()
            Image.fromarray(pixels).save(encoded, "PNG")
            fields = {"input.png": encoded.getvalue(), "mask.png": encoded.getvalue(), "kind.cls": str(label).encode()}
            for name, data in fields.items():
                entry = tarfile.TarInfo(f"{i:03d}.{name}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return path


@pytest.fixture
def run(tmp_path) -> Path:
    """A run that chose its members."""
    folder = imitate(tmp_path / "run", random_vit(num_classes=3, global_pool="avg"), "finetune", classes=None)
    settings = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(
        settings.replace("data: {", "data: {image_key: input.png, label_key: kind.cls, ")
    )
    return folder


@pytest.fixture
def tool(run, run_command) -> Callable[..., SimpleNamespace]:
    """`maedistill export` of the run, in this process."""
    return partial(run_command, "export", run)


def test_members_are_those_of_the_run(run, tool, tmp_path, monkeypatch):
    assert tool("--val", shard(tmp_path / "val.tar")).code == 0
    assert json.loads((run / "export/scorecard_timm.json").read_text())["images"] == 6
    network = open_network(f"run:{run}", "classifier")  # in place of exits, which this run has not
    monkeypatch.setattr(exits, "_open_all", lambda *_: ([0], [network, network]))
    monkeypatch.setattr(exits, "image_seconds", lambda networks, _: [[0.1]] * len(networks))
    context = EvalContext(torch.device("cpu"), batch=4, workers=0)
    assert exits.score_exits(str(run), str(tmp_path / "val.tar"), context)["images"] == 6
    (run / "config.yaml").unlink()
    assert run_members(run) == (None, None)


def test_what_can_be_known_before_the_work_is_said_before_it(run, tool, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_replace", lambda *_: pytest.fail("the work began"))
    right, wrong = shard(tmp_path / "right.tar"), shard(tmp_path / "wrong.tar", label=7)
    for words, cause in (
        (["--val", wrong], "have other labels"),
        (["--int8", "--val", right, "--calibration", tmp_path / "none-*.tar"], "none-*.tar"),
        (["--format", "onyx", "--val", right], "onyx"),
    ):
        ended = tool(*words)
        assert ended.code in (2, 3) and cause in ended.err
