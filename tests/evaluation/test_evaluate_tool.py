"""tools/evaluate.py on classifiers: any number of real processes counts the same; a mistake is two lines and a code."""

import csv
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

from maedistill.commands import evaluate as command
from maedistill.processes import distributed
from tests.evaluation.tool import VIT, classifier, evaluate, write_pictures

CONFIG = {"input_size": (3, 24, 24), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.25), "crop_pct": 0.9}
COUNTS = ("images", "top1_correct", "top5_correct", "vs_same_images", "vs_top1_correct")
SHARES = {"top1": "top1_correct", "top5": "top5_correct", "vs_same": "vs_same_images", "vs_top1": "vs_top1_correct"}
NUMBERS = ("loss", "calibration_error", "confidence", "vs_kl")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A model, another to compare it with, shards of 25 images, and models with mistakes."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_pictures(folder)
    torch.manual_seed(0)
    for name, classes in (("model", 12), ("other", 5)):
        keywords = {"model_args": VIT, "data_config": CONFIG, "safe_serialization": True}
        save_for_hf(classifier(num_classes=classes), folder / name, **keywords)
    small = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "global_pool": "token"}
    teacher = timm.create_model("vit_tiny_patch16_224", num_classes=12, **small)
    torch.nn.init.normal_(teacher.head.weight, std=0.5)
    seen = {"input_size": (3, 16, 16), "mean": (0.1, 0.2, 0.3), "std": (0.3, 0.2, 0.4), "crop_pct": 0.5}
    save_for_hf(teacher, folder / "teacher", model_args=small, data_config=seen, safe_serialization=True)
    order = [f"class{i:02d}" for i in (1, 0, *range(2, 12))]
    for name in ("permuted", "strange", "nan"):
        (folder / name).mkdir()
        for file in (folder / "model").iterdir():
            (folder / name / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "model/config.json").read_text())
    (folder / "permuted/config.json").write_text(json.dumps(config | {"label_names": order}))
    (folder / "strange/config.json").write_text(json.dumps(config | {"label_names": [*"abcdefghijkl"]}))
    weights = load_file(folder / "model/model.safetensors")
    save_file(weights | {"head.bias": torch.full((12,), torch.nan)}, folder / "nan/model.safetensors")
    return folder


@pytest.fixture(scope="module")
def results(launcher, made):
    """{processes: (stdout, JSON, rows of predictions.csv)}, the first with latency."""

    def start(ranks):
        out = made / f"out{ranks}"
        out.mkdir()
        files = ["--json", out / "result.json", "--predictions", out / "predictions.csv"]
        files += ["--per-class", out / "classes.csv", "--confusions", out / "worst.png", "--against", made / "teacher"]
        settings = ["--batch", 7, "--workers", ranks - 1] + (["--no-latency"] if ranks > 1 else [])
        ended = evaluate(launcher, made / "model", made / "shards/*.tar", *files, *settings, ranks=ranks)
        rows = list(csv.DictReader((out / "predictions.csv").read_text().splitlines()))
        return ended.out, json.loads((out / "result.json").read_text()), rows

    with ThreadPoolExecutor(2) as two:
        return dict(zip((1, 2, 3), two.map(start, (1, 2, 3)), strict=True))


def test_any_number_of_processes_counts_the_same(results):
    alone = results[1]
    assert alone[1]["images"] == 25 and 0 < alone[1]["top1"] < alone[1]["top5"] < 1
    assert all(alone[1][share] == alone[1][count] / 25 for share, count in SHARES.items())
    for ranks in (2, 3):
        assert [results[ranks][1][key] for key in COUNTS] == [alone[1][key] for key in COUNTS]
        for name in NUMBERS:
            assert results[ranks][1][name] == pytest.approx(alone[1][name], rel=1e-5), name
        for row, other in zip(alone[2], results[ranks][2], strict=True):
            # Kernels round by an image's place in its batch.
            assert float(other.pop("loss")) == pytest.approx(float(row["loss"]), rel=1e-5)
            assert other == {name: value for name, value in row.items() if name != "loss"}


def test_the_predictions_are_of_every_image_and_give_the_counts(results):
    rows = results[3][2]
    assert [int(row["id"]) for row in rows] == list(range(25)) and len({row["key"] for row in rows}) == 25
    assert sum(row["label"] == row["top1"] for row in rows) == results[3][1]["top1_correct"]
    assert sum(row["label"] in [row[f"top{k}"] for k in range(1, 6)] for row in rows) == results[3][1]["top5_correct"]
    assert all(row["label_name"] == f"class{int(row['label']):02d}" for row in rows)


def test_stdout_says_it_once(results, made):
    for ranks, (out, result, _) in results.items():
        names = [
            "model",
            "input",
            "vs.",
            "input",
            "data",
            "result",
            "calibration",
            "vs.",
            *(["speed"] if ranks == 1 else []),
        ]
        assert [line.split()[0] for line in out.splitlines()] == names
        assert f"({result['top1_correct']} of 25)" in out and result["fingerprint"][:12] in out
        assert "24 px, center crop 0.9, bicubic, mean 0.5 0.4 0.3, std 0.2 0.3 0.25" in out
    result = results[1][1]
    assert 0 < result["latency_ms"] <= result["latency_p90_ms"] and result["images_per_second"] > 0
    assert "latency_ms" not in results[2][1]
    assert result["model"] == f"local-dir:{made / 'model'}" and result["classes"] == 12


def test_classes_and_worst_confusions_are_written_alike_by_any_number_of_processes(results, made):
    tables = [(made / f"out{ranks}" / "classes.csv").read_text().splitlines() for ranks in results]
    for table in tables[1:]:
        for row, other in zip(csv.DictReader(tables[0]), csv.DictReader(table), strict=True):
            assert float(other.pop("confidence")) == pytest.approx(float(row.pop("confidence")), rel=1e-4)
            assert row == other
    rows = list(csv.DictReader(tables[0]))
    assert len(rows) == 12 and rows[3]["name"] == "class03"
    for column, count in (
        ("images", 25),
        ("correct", results[1][1]["top1_correct"]),
        ("correct5", results[1][1]["top5_correct"]),
    ):
        assert sum(int(row[column]) for row in rows) == count
    sheets = [np.asarray(Image.open(made / f"out{ranks}" / "worst.png")) for ranks in results]
    assert all(np.array_equal(sheet, sheets[0]) for sheet in sheets) and sheets[0].std() > 0


def test_agreement_is_what_both_models_say_alone(launcher, made, results):
    """Each model evaluated by itself, on its own input, gives the classes whose agreement was counted."""
    out = made / "teacher.csv"
    evaluate(launcher, made / "teacher", made / "shards/*.tar", "--predictions", out, "--no-latency", "--workers", 0)
    alone = list(csv.DictReader(out.read_text().splitlines()))
    same = sum(row["top1"] == other["top1"] for row, other in zip(alone, results[1][2], strict=True))
    assert results[1][1]["vs_same_images"] == same and 0 < same < 25
    assert results[1][1]["vs_top1_correct"] == sum(row["top1"] == row["label"] for row in alone)


MISTAKES = {
    "no such model": (["resnet18", "{shards}"], 2, "'resnet18' is neither", "did you mean timm:resnet18?"),
    "labels beyond the classes": (["{made}/other", "{shards}"], 3, "5 classes, 0 to 4, but 14 of 25", "finetune"),
    "classes in another order": (["{made}/permuted", "{shards}"], 3, "label 0 is 'class01' to it", "order"),
    "the other's classes in another order": (
        ["{made}/model", "{shards}", "--against", "{made}/permuted"],
        3,
        "{made}/permuted and the shards",
        "order",
    ),
    "nan": (["{made}/nan", "{shards}"], 4, "25 of 25 images is not finite", "fp32"),
    "no folder to write to": (["x", "y", "--json", "{made}/none/a.json"], 2, "--json: {made}/none/a.json", "folder"),
    "another number of classes": (
        ["{made}/model", "{shards}", "--against", "{made}/other"],
        2,
        "of --against 5",
        "--subset",
    ),
    "no names to match": (["{made}/model", "{shards}", "--subset"], 2, "does not name its 12 classes", "a run"),
    "other names": (
        ["{made}/strange", "{shards}", "--subset"],
        3,
        "has no class 'class00' (12 of",
        "as the model does",
    ),
    "no imagenet": (
        ["{made}/model", "{shards}", "--real"],
        2,
        "1,000 classes, and the model has 12",
        "leave out --real",
    ),
    "no folder for a picture": (
        ["x", "y", "--confusions", "{made}/no/a.png"],
        2,
        "--confusions: {made}/no/a.png",
        "folder",
    ),
    "one file for two": (
        ["x", "y", "--json", "{made}/a.json", "--per-class", "{made}/model/../a.json"],
        2,
        "--per-class and --json both name {made}/a.json",
        "two files",
    ),
    "a folder as file": (["x", "y", "--predictions", "{made}"], 2, "--predictions: {made} is a folder", "file"),
}


@pytest.fixture(scope="module")
def mistakes(launcher, made):
    def start(name):
        arguments, code, *_ = MISTAKES[name]
        words = [word.format(made=made, shards=made / "shards/*.tar") for word in arguments]
        return evaluate(launcher, *words, "--no-latency", "--workers", 0, code=code)

    with ThreadPoolExecutor(2) as two:
        return dict(zip(MISTAKES, two.map(start, MISTAKES), strict=True))


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_two_lines(mistakes, made, name):
    cause, remedy = mistakes[name].err.splitlines()
    assert cause.startswith("error: ") and MISTAKES[name][2].format(made=made) in cause
    assert remedy.startswith("  fix: ") and MISTAKES[name][3] in remedy


def test_classes_in_another_order_are_matched_by_name(launcher, made, results):
    """The model whose names are permuted answers what the other does, but for the two outputs that changed names."""
    out, shards = made / "subset.csv", made / "shards/*.tar"
    ended = evaluate(
        launcher, made / "permuted", shards, "--subset", "--predictions", out, "--no-latency", "--workers", 0
    )
    renamed = {"0": "1", "1": "0"}
    for row, other in zip(results[1][2], csv.DictReader(out.read_text().splitlines()), strict=True):
        assert other["top1"] == renamed.get(row["top1"], row["top1"]) and other["label"] == row["label"]
    assert "classes     12 of the 12 of local-dir:" in ended.out


@pytest.mark.parametrize("flags", [["--crop", "1.5"], ["--crop", "x"], ["--batch", "0"], ["--workers", "-1"]])
def test_a_wrong_number_is_named_before_anything_is_opened(launcher, flags):
    ended = evaluate(launcher, "model", "shards", *flags, code=2)
    assert f"argument {flags[0]}: {flags[1]} is no" in ended.err


def test_ranks_wait_half_an_hour_for_images_and_a_day_for_fits(monkeypatch):
    """Ranks have equal shares of the images, but not of the learning rates."""
    waits = []
    monkeypatch.setattr(distributed, "open_group", waits.append)
    for name in ("feature_eval.score_knn", "feature_eval.score_probe", "segmentation.score_segmentation"):
        monkeypatch.setattr(f"maedistill.evaluation.{name}", lambda *_, **__: None)
    threads, parts = ["--threads", str(torch.get_num_threads())], ["--train", "t", "--val", "v"]
    for words in (["knn", *parts], ["probe", *parts], ["segment", "--images", "i", "--masks", "m"]):
        arguments, start = command.parse([*words, "model", *threads])
        start(arguments)
    assert waits == [1800, 86400, 86400]


def test_more_classes_than_8_bits_have_are_refused(capsys):
    words = ["segment", "model", "--images", "i", "--masks", "m", "--classes"]
    assert command.parse([*words, "256"])[0].classes == 256
    with pytest.raises(SystemExit):
        command.parse([*words, "257"])
    assert "--classes: masks of 8 bits have at most 256 classes, not 257" in capsys.readouterr().err


def test_crop_and_size_can_be_others_than_the_models(launcher, made, results):
    """--image-size 40 resamples the positions, --crop 1 sees more: another result, of the images asked for."""
    out = made / "other.json"
    flags = ["--image-size", 40, "--crop", 1, "--no-latency", "--threads", 1, "--json", out, "--precision", "bf16"]
    ended = evaluate(launcher, f"local-dir:{made / 'model'}", made / "shards/*.tar", *flags)
    result = json.loads(out.read_text())
    assert "40 px, center crop 1, bicubic" in ended.out and result["images"] == 25
    assert (result["size"], result["crop"], result["precision"]) == (40, 1.0, "bf16")
    assert result["loss"] != results[1][1]["loss"]
