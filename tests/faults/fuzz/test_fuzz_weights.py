"""Checkpoints and weights of others: damage, lies, and forgeries whose every checksum holds.

A checkpoint that is taken fills the network, Adam's moments and the moving average; weights fill a ViT with finite
numbers. Nothing in a file is executed: what is taken are tensors and plain values.
"""

import hashlib
import io
import json
import shutil
import warnings
import zipfile
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save

from maedistill.errors import DataError
from maedistill.models.vits import build_vit
from maedistill.runs.checkpoint import latest_step
from maedistill.runs.restore import load_latest, newest_intact, read_weights
from maedistill.training.engine import MOMENTS, TrainingState
from maedistill.weights.from_file import read_weights_file
from maedistill.weights.state_dict import import_weights, load_encoder
from tests.faults.fuzz.damage import ODD, byte_edits, cases, edited, packed, regrown, tree_edits, unpacked

warnings.filterwarnings("ignore", module=r"torch\.")  # torch.load remarks on pickles that it reads all the same

REFUSALS = (DataError,)
Files = dict[str, bytes]
STEP = 7


def network() -> torch.nn.Module:
    """Two parameters and a buffer."""
    net = torch.nn.Linear(3, 2)
    net.register_buffer("table", torch.zeros(4))
    return net


def vit() -> torch.nn.Module:
    return build_vit("vit_tiny_patch16_224", image_size=16, width=8, depth=1, num_heads=2, patch_size=8)


def good_checkpoint() -> Files:
    """The files of a checkpoint of `network`, as runs/checkpoint.py describes them."""
    state = {name: torch.full_like(value, 0.5) for name, value in network().state_dict().items()}
    moments = {f"{kind}/{name}": state[name].clone() for kind in MOMENTS for name, _ in network().named_parameters()}
    document = {"step": STEP, "engine": {"updates": 7.0}, "loop": {"step": STEP, "bad_samples": 0, "keys": ["a"]}}
    weights = {"model.safetensors": save(state), "optimizer.safetensors": save(moments), "ema.safetensors": save(state)}
    return weights | {"state.json": json.dumps(document).encode()}


def manifest_of(files: Files) -> dict[str, Any]:
    """The manifest that vouches for these files."""
    lines = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    return {"format": 1, "files": lines}


CHECKPOINT = good_checkpoint()
VIT = {name: torch.full_like(value, 0.25) for name, value in vit().state_dict().items()}
TARGET, NETWORK, AVERAGE = vit(), network(), network()


def check(case: tuple[str, Any]) -> None:
    """A checkpoint folder, or a file of weights by its suffix."""
    kind, content = case
    if kind == "checkpoint":
        return check_checkpoint(content)
    path = Path(f"case.{kind}")
    path.write_bytes(content)
    load_encoder(TARGET, import_weights(read_weights_file(path), name=str(path)), name=str(path))
    assert all(value.isfinite().all() for value in TARGET.state_dict().values())


def check_checkpoint(files: Files) -> None:
    """Every reader of checkpoints, the loop's last."""
    folder = Path("checkpoints")
    shutil.rmtree(folder, ignore_errors=True)
    checkpoint = folder / f"step_{STEP:09d}"
    checkpoint.mkdir(parents=True)
    for name, data in files.items():
        (checkpoint / name).write_bytes(data)
    assert latest_step(folder) in (STEP, None)
    assert newest_intact(folder) == checkpoint
    if "model.safetensors" in files:
        assert all(isinstance(value, torch.Tensor) for value in read_weights(checkpoint).values())
    shapes = {name: tuple(value.shape) for name, value in NETWORK.state_dict().items()}
    engine = SimpleNamespace(shapes=lambda: shapes, module=NETWORK, load_state=fill)
    with torch.no_grad():
        state = load_latest(folder, engine, extra_networks={"ema": AVERAGE})
    assert isinstance(state, dict) and json.dumps(state, allow_nan=False)


def fill(training: TrainingState) -> None:
    """What the engine does with a state."""
    for name, value in NETWORK.state_dict().items():
        value.copy_(training.weights[name])
    for name, parameter in NETWORK.named_parameters():
        for kind in MOMENTS:
            torch.empty_like(parameter).copy_(training.moments[kind][name])
    assert all(float(value) == value for value in training.scalars.values())


def forged(files: Files, manifest: Any, edits: list[tuple] | None = None) -> Files:
    """A checkpoint whose mark fits its manifest; the manifest may be edited as a text first."""
    text = edited(json.dumps(manifest).encode(), edits or [])
    return files | {"manifest.json": text, "COMPLETE": hashlib.sha256(text).hexdigest().encode()}


def torch_saved(content: Any, *, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def rezipped(data: bytes, name: str, edits: list[tuple]) -> bytes:
    """A .pth with one of its entries edited, its checksums right."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for entry in old.namelist():
            new.writestr(entry, edited(old.read(entry), edits if entry.endswith(name) else []))
    return buffer.getvalue()


PTHS = {
    "zip": torch_saved({"model": VIT, "args": Namespace(a=1), "epoch": 3}),
    "legacy": torch_saved({"model": VIT}, zipped=False),
    "amd": torch_saved({"model": VIT, "generator_mask_tokens": [torch.zeros(1, 1, 8)]}),
}
NAMES = st.sampled_from([*sorted(CHECKPOINT), "manifest.json", "COMPLETE"])
ENTRIES = st.sampled_from(["data.pkl", "data.pkl", "version", "data/0", None])
ONES = torch.ones(4)
ODD_TENSORS = [
    torch.zeros(0), torch.tensor(1.0), torch.full((2, 2), float("nan")), ONES.to_sparse(), ONES.to(torch.complex64),
    ONES.int(), ONES.bool(), ONES.to(torch.float8_e4m3fn), ONES.bfloat16(), torch.ones(1).expand(2**40),
    torch.empty(2**50, device="meta"), torch.ones(8, 3, 2, 8, 8), torch.ones(8, 3, 1, 8, 8), torch.ones(1, 26, 8),
    torch.ones(8, 3, 4, 4), torch.ones(8, 3, 0, 4), torch.ones(1, 0, 8), torch.ones(1, 2, 8, dtype=torch.int64),
    torch.nn.Parameter(ONES),
]  # fmt: skip
KEYS = st.sampled_from(
    [*sorted(VIT), "blocks.0.attn.q_bias", "blocks.0.attn.v_bias", "model", "state_dict", "generator_mask_tokens",
     "head.bias", "decoder_embed.weight", "module.cls_token", "", "\n", "x" * 5000, 0, None, (1,)]
)  # fmt: skip
CONTENTS = st.dictionaries(KEYS, st.one_of(st.sampled_from(ODD_TENSORS), st.sampled_from(ODD)), max_size=4)


def test_what_is_not_damaged_is_taken(sandbox):
    assert sandbox(("checkpoint", forged(CHECKPOINT, manifest_of(CHECKPOINT)))) == "taken"
    assert sandbox(("safetensors", save(VIT))) == "taken"
    assert [sandbox(("pth", data)) for data in PTHS.values()] == ["taken"] * len(PTHS)


@cases(0.03)
@given(st.sampled_from(sorted(CHECKPOINT)), tree_edits(), byte_edits(2), st.booleans())
def test_checkpoints_whose_checksums_hold(sandbox, name, grown, edits, is_listed):
    data, files = CHECKPOINT[name], dict(CHECKPOINT)
    if name.endswith(".json"):
        data = json.dumps(regrown(json.loads(data), grown)).encode()
    else:
        header, body = unpacked(data)
        data = packed(regrown(header, grown), body)
    files[name] = edited(data, edits)
    sandbox(("checkpoint", forged(files, manifest_of(files if is_listed else files | {name: CHECKPOINT[name]}))))


@cases(0.03)
@given(tree_edits(), byte_edits(1), st.lists(st.tuples(NAMES, byte_edits(1)), max_size=2))
@example([], [("insert", 0, b"[" * 20_000)], [])
@example([], [], [("COMPLETE", [("set", 0, 255)])])
def test_manifests_that_lie(sandbox, grown, edits, damages):
    files = forged(CHECKPOINT, regrown(manifest_of(CHECKPOINT), grown), edits)
    for name, damage in damages:
        files[name] = edited(files[name], damage)
    sandbox(("checkpoint", files))


@cases(0.03)
@given(tree_edits(), byte_edits(2), st.sampled_from([None] * 8 + [0, 1, 2**31, 2**63 - 1]))
def test_safetensors_that_lie(sandbox, grown, edits, length):
    header, body = unpacked(save(VIT))
    sandbox(("safetensors", edited(packed(regrown(header, grown), body, length=length), edits)))


@cases(0.04)
@given(st.sampled_from(sorted(PTHS)), byte_edits(4), ENTRIES)
def test_damaged_pths(sandbox, kind, edits, entry):
    data = PTHS[kind]
    sandbox(("pth", edited(data, edits) if entry is None or kind == "legacy" else rezipped(data, entry, edits)))


@cases(0.03)
@given(CONTENTS, st.booleans(), st.sampled_from([None, "model", "state_dict"]))
@example({"generator_mask_tokens": 1}, True, None)
@example({"blocks.0.attn.q_bias": ONES, "blocks.0.attn.v_bias": torch.ones(2, 2)}, True, None)
@example({"patch_embed.proj.weight": ONES.int().expand(8, 3, 4, 4).contiguous()}, True, "model")
def test_weights_of_any_kind(sandbox, content, keeps, wrapper):
    content = (VIT | content) if keeps else content
    sandbox(("pth", torch_saved({wrapper: content} if wrapper else content)))
