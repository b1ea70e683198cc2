"""Graphs in a full pass: any number of processes counts what the network itself counts."""

import csv
import json
from pathlib import Path

import pytest
import torch
from timm.models import save_for_hf

from maedistill.errors import ConfigError
from maedistill.evaluation.context import EvalContext, metadata
from maedistill.exporting.graph import GRAPH_FILES, write_graphs
from maedistill.weights import from_onnx
from maedistill.weights.from_graph import Preprocessing, outputs_of
from maedistill.weights.graph import Graph, GraphInput
from maedistill.weights.network import Network
from maedistill.weights.open_network import open_network
from tests.conftest import two_at_a_time
from tests.evaluation.tool import CONFIG, VIT, classifier, evaluate, write_pictures

COUNTS = ("images", "top1_correct", "top5_correct", "vs_same_images", "vs_top1_correct")
VIEW = Preprocessing(size=24, crop=0.9, interpolation="bicubic", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A model of timm, its graphs, and 25 images."""
    folder = tmp_path_factory.mktemp("graphs")
    write_pictures(folder)
    torch.manual_seed(0)
    vit = classifier().eval()
    write_graphs([*GRAPH_FILES], vit, folder, VIEW)
    (folder / "preprocess.json").write_text(VIEW.model_dump_json())
    save_for_hf(vit, folder / "model", model_args=VIT, data_config=CONFIG, safe_serialization=True)
    return folder


@pytest.fixture(scope="module")
def results(launcher, made):
    """{(kind, processes): (stdout, JSON, rows of predictions.csv)}; latency of one process only."""

    def start(case):
        kind, ranks = case
        source = made / "model" if kind == "timm" else f"{kind}:{made / GRAPH_FILES[kind]}"
        result, rows = made / f"{kind}{ranks}.json", made / f"{kind}{ranks}.csv"
        words = ["--json", result, "--predictions", rows, "--batch", 7, "--workers", 0, "--against", made / "model"]
        words += ["--no-latency"] if ranks > 1 or kind == "timm" else []
        ended = evaluate(launcher, source, made / "shards/*.tar", *words, ranks=ranks)
        return ended.out, json.loads(result.read_text()), list(csv.DictReader(rows.read_text().splitlines()))

    cases = [("timm", 1), ("onnx", 1), ("onnx", 2), ("onnx", 3), ("torch_export", 2)]
    return two_at_a_time(start, cases)


def test_any_number_of_processes_counts_what_the_network_counts(results):
    _, network, rows = results["timm", 1]
    assert network["images"] == 25 and 0 < network["top1_correct"] < network["top5_correct"] < 25
    for _, graph, others in results.values():
        assert [graph[key] for key in COUNTS] == [network[key] for key in COUNTS] and graph["vs_same_images"] == 25
        for name in ("loss", "calibration_error", "confidence"):
            assert graph[name] == pytest.approx(network[name], rel=1e-4)
        assert graph["vs_kl"] == pytest.approx(0, abs=1e-9)
        assert [(row["id"], row["label"], row["top1"]) for row in others] == [
            (row["id"], row["label"], row["top1"]) for row in rows
        ]


def test_size_format_and_threads_are_said(results, made):
    for kind, ranks in (("onnx", 1), ("torch_export", 2)):
        out, result, _ = results[kind, ranks]
        size = (made / GRAPH_FILES[kind]).stat().st_size
        assert result["file_bytes"] == size and result["precision"] == "fp32" and result["classes"] == 12
        assert f"fp32, {size / 1e6:.2f} MB" in out.splitlines()[0]
    out, result, _ = results["onnx", 1]
    assert 0 < result["latency_ms"] <= result["latency_p90_ms"] and "fp32 on CPU, 1 threads" in out
    assert "file_bytes" not in results["timm", 1][1]


def test_a_result_names_the_processor_that_runs_a_graph():
    network = Network(torch.nn.Identity(), "onnx:model.onnx", 24, "mit", precision="int8")
    assert metadata(network, EvalContext(torch.device("cuda"), 4, workers=0))["device"].startswith("CPU, ")


def test_the_bytes_that_were_checked_are_those_that_run(made, tmp_path, monkeypatch):
    path, look = tmp_path / "model.onnx", from_onnx._input
    for file in ("model.onnx", "preprocess.json"):
        (tmp_path / file).write_bytes((made / file).read_bytes())

    def swapped(model):
        path.write_bytes(b"another file")
        return look(model)

    monkeypatch.setattr(from_onnx, "_input", swapped)
    assert open_network(f"onnx:{path}", "predictor").num_classes == 12


@pytest.mark.parametrize(
    ("run", "cause"),
    [
        (lambda images: (images.flatten(1),), r"cannot run on 1 images of 4 pixels \(AttributeError"),
        (lambda images: {"logits": images.flatten(1)}, "cannot run on 1 images"),
        (lambda images: {}["logits"], r"cannot run on 1 images of 4 pixels \(KeyError"),
        (lambda images: images[:, 9], r"cannot run on 1 images of 4 pixels \(IndexError"),
        (lambda images: images.sum(), r"gives \(\) for two images"),
        (lambda images: images, r"gives \(2, 3, 4, 4\) for two images"),
        (lambda images: images.flatten(1)[:, :0], r"gives \(2, 0\) for two images"),
        (lambda images: images.flatten(1)[:1], r"gives \(1, 48\) for two images"),
    ],
)
def test_a_graph_that_gives_no_row_for_each_image_is_refused(run, cause):
    with pytest.raises(ConfigError, match=cause):
        outputs_of(Graph(run, GraphInput(4, pixels=False), num_numbers=0), "onnx:model.onnx", size=4)


@pytest.mark.parametrize(
    ("flags", "cause"),
    [
        (["--precision", "bf16"], "is a graph in fp32, which does not compute in bf16"),
        (["--image-size", 32], "takes images of 24 pixels, not of 32"),
        (["--ema"], "has no weights called 'ema'"),
        (["--exit", 0], "has no exits"),
    ],
)
def test_options_that_a_graph_does_not_have_are_refused(launcher, made, flags, cause):
    ended = evaluate(launcher, f"onnx:{made / 'model.onnx'}", made / "shards/*.tar", *flags, code=2)
    error, fix = ended.err.splitlines()
    assert cause in error and fix.startswith("  fix: ")
