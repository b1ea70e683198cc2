"""Graphs of others: damaged ONNX files, and torch.export archives whose graph was edited as JSON.

A file that is taken runs on two images. Nothing in it is executed but operators on tensors.
"""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from maedistill.errors import ConfigError, DataError
from maedistill.weights.open_network import open_network
from tests.faults.fuzz.damage import byte_edits, cases, edited, regrown, tree_edits
from tests.weights.test_from_graph import VIEW, linear

REFUSALS = (DataError, ConfigError)
ONNX = linear().SerializeToString()
FILES = {"onnx": "model.onnx", "torch_export": "model.pt2"}


def good_program() -> dict[str, bytes]:
    """The entries of an archive of torch.export."""
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2)).eval()
    shapes, buffer = ({0: torch.export.Dim("batch", min=1)},), io.BytesIO()
    torch.export.save(torch.export.export(network, (torch.zeros(2, 3, 4, 4),), dynamic_shapes=shapes), buffer)
    with zipfile.ZipFile(buffer) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


PROGRAM = good_program()
JSONS = sorted(name for name in PROGRAM if name.endswith(".json"))


def zipped(entries: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def check(case: tuple[str, Any]) -> None:
    """A graph by its kind, beside a preprocess.json that fits the good ones."""
    kind, content = case
    Path("preprocess.json").write_text(json.dumps(VIEW))
    Path(FILES[kind]).write_bytes(content)
    network = open_network(f"{kind}:{FILES[kind]}", "predictor")
    assert network.module(torch.zeros(2, 3, 4, 4)).shape == (2, network.num_classes)


def test_what_is_not_damaged_is_taken(sandbox):
    assert sandbox(("onnx", ONNX)) == "taken" and sandbox(("torch_export", zipped(PROGRAM))) == "taken"


@cases(0.05)
@given(byte_edits(4))
def test_damaged_onnx(sandbox, edits):
    sandbox(("onnx", edited(ONNX, edits)))


@cases(0.03)
@given(st.sampled_from(JSONS), tree_edits(), byte_edits(1))
@example(JSONS[0], [], [("insert", 0, b"[" * 20_000)])
def test_programs_whose_graph_lies(sandbox, name, grown, edits):
    text = json.dumps(regrown(json.loads(PROGRAM[name]), grown)).encode()
    sandbox(("torch_export", zipped(PROGRAM | {name: edited(text, edits)})))
