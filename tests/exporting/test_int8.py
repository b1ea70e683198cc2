"""int8 of a tiny trained network: as accurate as asked for, with the layers in float that need it, or refused."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from timm.layers import SwiGLU
from timm.models.vision_transformer import ResPostBlock
from torch import nn

from maedistill.data.shards.sources import open_folder
from maedistill.data.shards.write import make_shards
from maedistill.errors import DataError
from maedistill.evaluation.context import EvalContext
from maedistill.exporting.folder import export
from maedistill.exporting.graph import write_graphs
from maedistill.exporting.int8 import INT8_FILE, Int8Spec, _quantiser, quantise
from maedistill.models.vits import build_vit
from maedistill.weights.open_network import open_network
from tests.exporting.imitation import MEAN, STD, TINY, imitate
from tests.exporting.test_graph import images, of_timm, stated

MOVES = ("Transpose", "Reshape", "Flatten", "Concat", "Slice", "Expand", "Gather", "Squeeze", "Unsqueeze", "Identity")
CONTEXT = EvalContext(torch.device("cpu"), batch=32, workers=0)


def pictures(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Stripes of three directions with noise: uint8 [n, 3, 32, 32], labels [n]."""
    draws = np.random.default_rng(seed)
    row, column = np.mgrid[0:32, 0:32] / 32
    labels = np.arange(count) % 3
    phases = draws.uniform(0, 1.5, (count, 1, 1))
    waves = np.sin(12 * np.stack([row, column, row + column])[labels] + phases)  # [n, 32, 32]
    pixels = 128 + 40 * waves[:, None] + draws.normal(0, 50, (count, 3, 32, 32))
    return torch.from_numpy(pixels.clip(0, 255).astype(np.uint8)), torch.from_numpy(labels)


@pytest.fixture(scope="module")
def stripes(tmp_path_factory) -> Path:
    """96 training and 60 validation images."""
    folder = tmp_path_factory.mktemp("stripes")
    for split, count in (("train", 96), ("val", 60)):
        for i, (pixels, label) in enumerate(zip(*pictures(count, count), strict=True)):
            file = folder / "in" / split / "abc"[label] / f"{i:03d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file)
    make_shards(open_folder(folder / "in"), folder / "out")
    return folder / "out"


def trained() -> nn.Module:
    """A network that tells the stripes apart, but is not certain of all."""
    torch.manual_seed(0)
    vit = build_vit("vit_tiny_patch16_224", image_size=32, num_classes=3, global_pool="avg", **TINY)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    pixels, labels = pictures(96, 96)
    images, optimizer = (pixels / 255 - mean) / std, torch.optim.AdamW(vit.parameters(), 3e-3)
    for _ in range(35):
        loss = nn.functional.cross_entropy(vit(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return vit.eval()


@torch.no_grad()
def with_outlier(vit: nn.Module) -> nn.Module:
    """The same function, of which one layer has an input with an outlier, as those of large ViTs have."""
    norm, layer = vit.fc_norm, vit.head
    channel = int(norm.weight.abs().argmax())
    for parameter in (norm.weight, norm.bias):
        parameter[channel] *= 1e6
    layer.weight[:, channel] /= 1e6
    return vit


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The ONNX export of a network with an outlier."""
    run = tmp_path_factory.mktemp("run")
    imitate(run, with_outlier(trained()), "finetune", classes=["a", "b", "c"])
    return export(run, formats=("onnx",))


def spec(stripes: Path, **changed: object) -> Int8Spec:
    values = {"calibration": str(stripes), "val": str(stripes), "context": CONTEXT, "images": 48}
    return Int8Spec(**values | changed)


def readers_of_int8(graph: onnx.GraphProto) -> set[str]:
    """The nodes that compute with a tensor out of int8, or with one that only moves it."""
    by_output = {name: node for node in graph.node for name in node.output}

    def rounded(name: str) -> bool:
        node = by_output.get(name)
        moved = node is not None and node.op_type in MOVES and any(map(rounded, node.input))
        return moved or (node is not None and node.op_type == "DequantizeLinear")

    computing = [node for node in graph.node if node.op_type not in (*MOVES, "QuantizeLinear", "DequantizeLinear")]
    return {node.name for node in computing if any(map(rounded, node.input))}


def test_what_shares_an_input_with_a_layer_reads_it_in_float(tmp_path):
    """The residual stream of post-norm blocks goes into qkv and fc1; the two halves of a SwiGLU read one tensor."""
    shape = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
    vit = of_timm("vit_tiny_patch16_224", **shape, block_fn=ResPostBlock, mlp_layer=SwiGLU)
    write_graphs(["onnx"], vit, tmp_path, stated(vit))
    with _quantiser(tmp_path, images(32), "percentile") as (layers, write):
        assert len(layers) == 12 and {"blocks.0.mlp.fc1_g", "blocks.0.mlp.fc1_x"} < set(layers)
        some = [layer for layer in layers if not layer.endswith("fc1_g")]
        write(some)
    assert readers_of_int8(onnx.load(tmp_path / INT8_FILE).graph) == set(some)


@pytest.mark.parametrize("method", ["percentile", "entropy"])
def test_the_layer_that_collapses_stays_in_float(folder, stripes, method, capfd):
    record = quantise(folder, spec(stripes, method=method))
    assert record["top1_fp32"] > 0.8 and record["drop"] <= 0.5 and record["images"] == 60
    errors = record["layer_errors"]
    assert len(errors) == 10 and [*errors.values()] == sorted(errors.values(), reverse=True)
    assert next(iter(errors)) == "head" and errors["head"] > 0.5 and record["in_float"] == ["head"]
    graph = onnx.load(folder / INT8_FILE).graph
    scaled = {node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    held = {tensor.name: tensor for tensor in graph.initializer}
    weights = [held[name] for name in scaled if name in held and held[name].data_type == onnx.TensorProto.INT8]
    assert len(weights) == 10 - len(record["in_float"])
    assert readers_of_int8(graph) == set(errors) - {"head"}
    network = open_network(f"onnx:{folder / INT8_FILE}", "predictor")
    assert network.precision == "int8" and network.file_bytes < (folder / "model.onnx").stat().st_size
    assert capfd.readouterr() == ("", "")


def test_what_cannot_be_done_is_said(folder, stripes):
    with pytest.raises(DataError, match=r"(?s)8 of 10 .*head.*--max-drop"):
        quantise(folder, spec(stripes, max_drop=-100.0))


def test_calibration_without_images_is_refused(folder, stripes, tmp_path):
    source = next(stripes.glob("train-*.tar"))
    data = bytearray(source.read_bytes())
    start = 0
    while (start := data.find(b"\x89PNG", start)) >= 0:
        data[start : start + 16] = bytes(16)
    (tmp_path / source.name).write_bytes(data)
    with pytest.raises(DataError, match=r"none of the 48 images for calibration from .* can be decoded"):
        quantise(folder, spec(stripes, calibration=str(tmp_path / source.name)))
    with pytest.raises(DataError, match="no file matches"):
        quantise(folder, spec(stripes, calibration=str(tmp_path / "none-*.tar")))


def test_the_tool_quantises_and_evaluates_every_format(folder, stripes, tmp_path, run_command):
    start, out = partial(run_command, "export", folder.parent), tmp_path / "out"
    words = ["--int8", "--calibration", stripes, "--val", stripes, "--calibration-images", 32, "--with-preprocessing"]
    ended = start("--out", out, *words, "--batch", 16)
    assert ended.code == 0 and "int8     top-1 " in ended.out and " points" in ended.out, ended.err
    record = json.loads((out / "export.json").read_text())
    results = {name: json.loads((out / f"scorecard_{name}.json").read_text()) for name in ("timm", "onnx", "int8")}
    assert record["formats"] == ["timm", "onnx"] and record["int8"]["calibration_images"] == 32
    assert results["timm"]["top1"] == results["onnx"]["top1"] == record["int8"]["top1_fp32"]
    assert results["int8"]["top1"] == record["int8"]["top1_int8"] and results["int8"]["precision"] == "int8"
    assert results["onnx"]["vs_same"] == 1.0 and results["onnx"]["vs_kl"] < 1e-8 and results["int8"]["vs_kl"] > 0
    assert results["int8"]["file_bytes"] == (out / INT8_FILE).stat().st_size and results["int8"]["latency_ms"] > 0
    assert (
        "uint8 pixels" in (out / "README.md").read_text()
        and "`model_int8.onnx`: static" in (out / "README.md").read_text()
    )
    places = (str(tmp_path).encode(), str(folder.parent).encode())
    assert not [file.name for file in out.iterdir() if any(place in file.read_bytes() for place in places)]
    assert start("--int8").code == 2 and start("--max-drop", "1").code == 2
    assert "--calibration-method needs --int8" in start("--calibration-method", "entropy").err
