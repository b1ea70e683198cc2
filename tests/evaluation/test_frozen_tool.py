"""`tools/evaluate.py knn` and `probe` in real processes: one and two of them say the same; mistakes are two lines."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from maedistill.data.shards.sources import open_folder
from maedistill.data.shards.write import make_shards
from maedistill.evaluation.context import EvalContext
from maedistill.evaluation.feature_eval import ProbeSpec, open_pair
from maedistill.evaluation.features import extract_features, random_subset
from maedistill.weights.backbone import open_backbone
from tests.conftest import two_at_a_time
from tests.evaluation.tool import evaluate, save_encoders


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A network without classifier, a broken one, and shards that do not belong to those of `shards`."""
    folder = tmp_path_factory.mktemp("frozen")
    save_encoders(folder)
    for name, classes in (("renamed", "abx"), ("more", "abcd"), ("bare", [""])):
        for label in classes:
            path = folder / name / label / "0.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (9, 9)).save(path)
        make_shards(open_folder(folder / name), folder / name / "shards")
    return folder


@pytest.fixture(scope="module")
def results(launcher, made, shards):
    """{(form, processes): (stdout, JSON)}."""
    flags = {"knn": ["--k", "1,5,96"], "probe": ["--lr", "0.3,3,30", "--epochs", 8, "--head-batch", 16]}

    def start(case):
        form, ranks = case
        out = made / f"{form}{ranks}.json"
        where = ["--train", shards / "train-*.tar", "--val", shards / "val-*.tar", "--json", out]
        settings = ["--batch", 7, "--workers", ranks - 1]
        ended = evaluate(launcher, form, made / "model", *where, *flags[form], *settings, ranks=ranks)
        return ended.out, json.loads(out.read_text())

    cases = [(form, ranks) for form in flags for ranks in (1, 2)]
    return two_at_a_time(start, cases)


def test_any_number_of_processes_says_the_same(results):
    for form in ("knn", "probe"):
        alone, (_, together) = results[form, 1][1], results[form, 2]
        assert alone.keys() == together.keys()
        counts = ("top1", "top1_correct", "top5_correct", "images", "k", "lr")
        for row, other in zip(
            *(found["knn" if form == "knn" else "rates"] for found in (alone, together)), strict=True
        ):
            assert [row.get(name) for name in counts] == [other.get(name) for name in counts]
            assert row.get("loss", 0.0) == pytest.approx(other.get("loss", 0.0), rel=1e-4)
            assert row["images"] == 24 and 8 <= row["top1_correct"] <= 24 and row["top1"] == row["top1_correct"] / 24


def test_the_votes_are_those_of_scikit_learn_on_the_same_features(results, made, shards):
    context = EvalContext(torch.device("cpu"), batch=96, workers=0)
    opened = open_backbone(str(made / "model"))
    pair = open_pair(ProbeSpec(str(made / "model"), str(shards / "train-*.tar"), str(shards / "val-*.tar")))
    (bank, bank_labels), (queries, labels) = (extract_features(opened, index, context) for index in pair)
    assert bank.shape == (96, 32) and bank_labels.tolist() == pair[0].labels.tolist()
    for score in results["knn", 1][1]["knn"]:
        oracle = KNeighborsClassifier(score["k"], metric="cosine", weights=lambda distance: np.exp(-distance / 0.07))
        right = oracle.fit(bank.double(), bank_labels).predict(queries.double()) == labels.numpy()
        assert score["top1_correct"] == right.sum()


def test_stdout_says_which_features_and_how_good(results, made):
    out, result = results["probe", 1]
    labels = ["model", "input", "train", "val", "features", "probe", "lr", "lr", "lr", "result"]
    assert [line.split()[0] for line in out.splitlines()] == labels
    assert "mean of the patches at the end of the network, 32 wide" in out
    assert "batch 16" in out and f"({result['top1_correct']} of 24)" in out.splitlines()[-1]
    assert "chosen on the same images from 3 rates" in out
    assert result["top1"] == max(rate["top1"] for rate in result["rates"])
    out, result = results["knn", 1]
    assert [line.split()[0] for line in out.splitlines()][5:] == ["knn"] * 3 + ["warning"]
    assert result["model"] == f"local-dir:{made / 'model'}" and result["temperature"] == 0.07


def test_a_pre_training_run_has_features_at_every_block(launcher, mae, shards):
    where = ["--train", shards / "train-*.tar", "--val", shards / "val-*.tar"]
    flags = ["--block", -2, "--pool", "class", "--k", 5, "--image-size", 48, "--workers", 0, "--threads", 1]
    ended = evaluate(launcher, "knn", mae.run, *where, *flags)
    assert f"run:{mae.run} step_" in ended.out and "no classifier" in ended.out
    assert "48 px" in ended.out and "class token at block 0, 32 wide" in ended.out


def test_a_pre_training_run_is_scored_as_it_scores_itself(launcher, pretraining, settings, shards, tmp_path):
    knn = ["data.eval_crop=0.6", "log.knn_images=96", "log.knn_every_epochs=1", "optim.epochs=1"]
    ended = pretraining("scored", *settings["mae"], *knn, "log.pictures_every_epochs=null", witness=True)
    (record,) = [record for record in ended.records() if "knn" in record]
    where = ["--train", shards / "train-*.tar", "--val", shards / "val-*.tar", "--json", tmp_path / "knn.json"]
    evaluate(launcher, "knn", ended.run, *where, "--k", 20, "--batch", 12, "--workers", 0, "--threads", 1)
    found = json.loads((tmp_path / "knn.json").read_text())
    assert (found["knn"][0]["top1"], found["crop"]) == (record["knn"], 0.6)
    opened = open_backbone(str(ended.run))
    pair = open_pair(ProbeSpec("", str(shards / "train-*.tar"), str(shards / "val-*.tar")))
    context = EvalContext(torch.device("cpu"), batch=12, workers=0)
    for index, (rows, _) in zip(pair, torch.load(ended.run / "features-0.pt"), strict=True):
        again, _ = extract_features(opened, index, context)
        torch.testing.assert_close(again[random_subset(index, 96)], rows, rtol=0, atol=1e-5)


PAIR = ["--train", "{shards}/train-*.tar", "--val", "{shards}/val-*.tar"]
MISTAKES = {
    "an encoder as classifier": (["{made}/model", "{shards}/val-*.tar"], 2, "has no classifier", "evaluate probe"),
    "a bank too small": (["knn", "{made}/model", *PAIR, "--k", "5,97"], 2, "--k 97 needs 97 training", "smaller --k"),
    "no such block": (["probe", "{made}/model", *PAIR, "--block", "2"], 2, "no block 2: there are 2,", "--block"),
    "no labels": (
        ["knn", "{made}/model", *PAIR[:3], "{made}/bare/shards/*.tar"],
        3, "1 of 1 samples have no label", "labelled",
    ),
    "other names": (
        ["probe", "{made}/model", *PAIR[:3], "{made}/renamed/shards/*.tar"],
        3, "label 2 is 'c' in the shards of --train and 'x'", "same classes",
    ),
    "more classes": (
        ["knn", "{made}/model", *PAIR[:3], "{made}/more/shards/*.tar"],
        3, "1 of the classes in {made}/more/shards/*.tar have no image", "one data set",
    ),
    "nan": (["knn", "{made}/nan", *PAIR, "--k", "1"], 4, "features of 96 of 96 images are not finite", "fp32"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_two_lines(two_lines, made, shards, name):
    words, code, cause, remedy = MISTAKES[name]
    error, fix, _ = two_lines(code, *(word.format(made=made, shards=shards) for word in words))
    assert cause.format(made=made) in error and remedy in fix
