"""tools/evaluate.py on classifiers: any number of real processes counts the same; a mistake is two lines and a code."""

import csv
import json
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
from tests.conftest import two_at_a_time
from tests.evaluation.tool import CONFIG, VIT, classifier, evaluate, write_pictures

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

    return two_at_a_time(start, (1, 2, 3))


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


def test_stdout_says_it_once(results, made):
    for ranks, (out, result, _) in results.items():
        assert len(out.splitlines()) == (9 if ranks == 1 else 8), "of the first process alone"
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
    "one file for two": (
        ["x", "y", "--json", "{made}/a.json", "--per-class", "{made}/model/../a.json"],
        2,
        "--per-class and --json both name {made}/a.json",
        "two files",
    ),
    "a folder as file": (["x", "y", "--predictions", "{made}"], 2, "--predictions: {made} is a folder", "file"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_two_lines(two_lines, made, name):
    words, code, cause, remedy = MISTAKES[name]
    words = [word.format(made=made, shards=made / "shards/*.tar") for word in words]
    error, fix, _ = two_lines(code, *words, "--no-latency")
    assert cause.format(made=made) in error and remedy in fix


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


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("m s --crop 1.5", "argument --crop: 1.5 is no"),
        ("m s --batch 0", "argument --batch: 0 is no"),
        ("m s --workers -1", "argument --workers: -1 is no"),
        ("embed m s o --pool class --patches", "not allowed with"),
        ("embed m s o --per-file 0", "0 is no whole number from 1"),
        ("knn m --train t --val v --k 5,5", "5,5 is no list of different values"),
        ("knn m --train t --val v --temperature 0", "0 is no number above 0"),
        ("probe m --train t --val v --lr 0.1,x", "x is no number above 0"),
        ("probe m --train t --val v --head-batch 1", "1 is no whole number from 2"),
        ("probe m --train t", "--val"),
        ("segment m --images i --masks m --val-images v", "--val-images and --val-masks need each other"),
        ("segment m --images i --masks m --ignore 256", "256 is no number of 8 bits"),
        ("segment m --images i --masks m --classes 257", "at most 256 classes, not 257"),
    ],
)
def test_a_wrong_argument_is_named_before_anything_is_opened(capsys, words, told):
    with pytest.raises(SystemExit) as ended:
        command.parse(words.split())
    assert ended.value.code == 2 and told in capsys.readouterr().err


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


def test_crop_and_size_can_be_others_than_the_models(launcher, made, results):
    """--image-size 40 resamples the positions, --crop 1 sees more: another result, of the images asked for."""
    out = made / "other.json"
    flags = ["--image-size", 40, "--crop", 1, "--no-latency", "--threads", 1, "--json", out, "--precision", "bf16"]
    ended = evaluate(launcher, f"local-dir:{made / 'model'}", made / "shards/*.tar", *flags)
    result = json.loads(out.read_text())
    assert "40 px, center crop 1, bicubic" in ended.out and result["images"] == 25
    assert (result["size"], result["crop"], result["precision"]) == (40, 1.0, "bf16")
    assert result["loss"] != results[1][1]["loss"]
