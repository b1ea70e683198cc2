"""Graphs give the network's outputs: every kind of network, in every format, for any number of images."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from timm.layers import SwiGLU
from torch import nn

from maedistill.errors import ConfigError, DataError
from maedistill.exporting import graph as module
from maedistill.exporting.folder import export, read_record
from maedistill.exporting.graph import GRAPH_FILES, write_graphs
from maedistill.models.exits import ExitHead, ending_at
from maedistill.weights.from_graph import OPENERS, Preprocessing, read_preprocessing
from maedistill.weights.open_network import open_network
from tests.exporting.imitation import CROP, MEAN, STD, imitate, random_vit


def with_exit() -> nn.Module:
    """A network that ends at an exit after its first block, with random weights of its own."""
    vit = random_vit(num_classes=4, global_pool="avg", depth=3)
    head = ExitHead(vit)
    nn.init.normal_(head.head.weight)
    return ending_at(vit, 0, head)


def of_timm(name: str, **arguments: object) -> nn.Module:
    """A network of timm, with a classifier that tells images apart."""
    torch.manual_seed(0)
    network = timm.create_model(name, pretrained=False, num_classes=4, **arguments).eval()
    nn.init.normal_(network.get_classifier().weight)
    return network


@torch.no_grad()
def centred(network: nn.Module) -> nn.Module:
    """The network with another bias, since one class is the best for every image."""
    network.get_classifier().bias -= network(images(8)).mean(0)
    return network


ROPE = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
KINDS = {
    "class token": lambda: random_vit(num_classes=4, global_pool="token"),
    "class token, mean of the patches": lambda: random_vit(num_classes=4, global_pool="avg"),
    "no class token": lambda: random_vit(num_classes=4, global_pool="avg", class_token=False),
    "registers": lambda: random_vit(num_classes=4, global_pool="token", register_tokens=3),
    "fixed positions": lambda: random_vit(num_classes=4, global_pool="avg", pos_embed="sincos2d"),
    "encoder": lambda: random_vit(global_pool="avg"),
    "attention pooling, LayerScale": lambda: random_vit("test_vit3", num_classes=4, global_pool="map"),
    "RMSNorm, SwiGLU": lambda: of_timm("test_vit4", img_size=32, mlp_layer=SwiGLU),
    "qk-norm, parallel blocks": lambda: random_vit("vit_base_patch16_xp_224", num_classes=4, global_pool="avg"),
    "RoPE": lambda: of_timm("vit_small_patch16_dinov3", **ROPE),
    "exit": lambda: centred(with_exit()),
    "CNN": lambda: centred(of_timm("test_resnet")),
}


def stated(network: nn.Module, **changed: object) -> Preprocessing:
    values = {"size": 32, "crop": CROP, "interpolation": "bicubic", "mean": tuple(MEAN), "std": tuple(STD)}
    return Preprocessing(**values | {"gives": "logits" if network.num_classes else "features"} | changed)


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("kind", KINDS)
def test_graphs_give_the_networks_outputs(kind, tmp_path):
    network = KINDS[kind]()
    distances = write_graphs([*GRAPH_FILES], network, tmp_path, stated(network))
    assert distances.keys() == GRAPH_FILES.keys() and max(distances.values()) < 1e-5
    for name, file in GRAPH_FILES.items():
        graph = OPENERS[name](tmp_path / file)
        assert (graph.takes.side, graph.takes.pixels) == (32, False)
        for count in (1, 5):
            with torch.no_grad():
                expected, given = network(images(count)), graph(images(count))
            torch.testing.assert_close(given, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
            if name == "torch_export":  # which others open with torch
                with torch.no_grad():
                    assert torch.equal(given, torch.export.load(tmp_path / file).module()(images(count)))
            assert torch.equal(given.argmax(1), expected.argmax(1)) and expected.std() > 0.01
    assert len(expected.argmax(1).unique()) > 1, "a network of one answer would prove nothing"


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """All formats of one network, whose graphs take pixels."""
    run = tmp_path_factory.mktemp("run")
    imitate(run, random_vit(num_classes=3, global_pool="avg"), "finetune")
    return export(run, formats=("timm", "onnx", "torch_export"), with_preprocessing=True)


STRANGER = """
import sys, numpy, onnxruntime
session = onnxruntime.InferenceSession("model.onnx")
numpy.save("given.npy", session.run(None, {session.get_inputs()[0].name: numpy.load("pixels.npy")})[0])
assert not [name for name in sys.modules if name.startswith(("maedistill", "torch", "timm"))]
"""


def test_onnxruntime_alone_runs_the_graph_on_pixels(exported, tmp_path):
    """Predictions on photographs' pixels are those of timm's transform and network."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    model = timm.create_model(f"local-dir:{exported}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    network = open_network(f"onnx:{exported / 'model.onnx'}", "predictor")
    pixels = network.transform()(picture)[None]
    (tmp_path / "model.onnx").write_bytes((exported / "model.onnx").read_bytes())
    np.save(tmp_path / "pixels.npy", pixels.numpy())
    subprocess.run([sys.executable, "-c", STRANGER], cwd=tmp_path, check=True)
    expected = model(transform(picture)[None]).detach()
    given = torch.from_numpy(np.load(tmp_path / "given.npy"))
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_what_stands_beside_the_graph(exported):
    view = read_preprocessing(exported / "preprocess.json")
    assert (view.size, view.crop, view.mean, view.std) == (32, CROP, tuple(MEAN), tuple(STD))
    assert (view.interpolation, view.input, view.gives) == ("bicubic", "uint8", "logits")
    assert view.classes == ("ant", "bee", "cat") and view.license == "cc-by-nc-4.0"
    card, record = (exported / "README.md").read_text(), read_record(exported)
    assert "`model.onnx` (onnxruntime): " in card and "uint8 pixels" in card and "local-dir" in card
    assert max(record["graphs"].values()) < 1e-5 and record["versions"].keys() >= {"onnxruntime", "onnxscript"}
    for file in GRAPH_FILES.values():
        data = (exported / file).read_bytes()
        places = (b"site-packages", b"stack_trace", str(exported.parent).encode())  # of this machine
        assert not [place for place in places if place in data]


def test_a_border_has_the_mean_that_the_graph_has_inside(exported, tmp_path):
    (tmp_path / "model.onnx").write_bytes((exported / "model.onnx").read_bytes())
    view = json.loads((exported / "preprocess.json").read_text()) | {"crop_mode": "border", "crop": 1.0}
    (tmp_path / "preprocess.json").write_text(json.dumps(view))
    network = open_network(f"onnx:{tmp_path / 'model.onnx'}", "predictor")
    seen = network.transform()(Image.new("RGB", (60, 20), "white"))  # padded above and below
    assert seen[:, 0, 0].tolist() == [round(255 * value) for value in MEAN] and (seen[:, 16] > 250).all()
    assert network.mean == (0.0, 0.0, 0.0), "of what the graph takes"


def test_weights_beyond_one_file_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_MOST_BYTES", 1000)
    network = random_vit(global_pool="avg")
    with pytest.raises(ConfigError, match=r"(?s)one ONNX file holds at most 2 GB.*--format timm,torch_export"):
        write_graphs(["onnx"], network, tmp_path, stated(network))
    assert not [*tmp_path.iterdir()]


def test_a_graph_that_differs_is_refused(tmp_path, monkeypatch):
    network, written = random_vit(num_classes=3, global_pool="avg"), module._trace

    def other(network, *arguments):
        changed = copy.deepcopy(network)
        changed.head.bias.data += 0.01
        return written(changed, *arguments)

    monkeypatch.setattr(module, "_trace", other)
    with pytest.raises(DataError, match=r"outputs of model\.pt2 differ from the network's by 0\.0"):
        write_graphs(["torch_export"], network, tmp_path, stated(network))


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"formats": ("onyx",)}, "there is no 'onyx'"),
        ({"with_preprocessing": True}, "only graphs can normalise"),
        ({"formats": ("onnx",), "needs_classifier": True}, "has no classifier"),
    ],
)
def test_requests_without_sense_are_refused(tmp_path, options, cause):
    run = imitate(tmp_path / "run", random_vit())
    with pytest.raises(ConfigError, match=cause):
        export(run, **options)
    assert not (run / "export").exists()


@pytest.mark.parametrize("package", ["onnxruntime", "onnxscript"])
def test_without_the_packages_onnx_is_refused(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    run = imitate(tmp_path / "run", random_vit())
    with pytest.raises(ConfigError, match=rf"(?s)not installed \({package}\).*pip install 'maedistill\[onnx\]'"):
        export(run, formats=("onnx",))
    assert not (run / "export").exists()


def test_an_encoders_graph_alone(tmp_path):
    run = imitate(tmp_path / "run", random_vit())
    out = export(run, formats=("torch_export",))
    assert {path.name for path in out.iterdir()} == {"model.pt2", "preprocess.json", "README.md", "export.json"}
    assert json.loads((out / "preprocess.json").read_text())["gives"] == "features"
    front = yaml.safe_load((out / "README.md").read_text().split("---\n")[1])
    assert "library_name" not in front and "timm" not in front["tags"], "timm cannot open it"
    with pytest.raises(ConfigError, match=r"(?s)an encoder, whose graph gives features.*maedistill evaluate knn"):
        open_network(str(out / "model.pt2"), "predictor")
