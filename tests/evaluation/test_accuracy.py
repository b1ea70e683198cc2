"""A full pass against a plain loop; each image once, whatever the batch and the ranks."""

import csv
import tarfile
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform
from timm.models import save_for_hf
from torch import nn
from torch.nn import functional as F

from maedistill.data.loading.evaluation import EvaluationImages, evaluation_transform
from maedistill.data.shards.open_index import open_index
from maedistill.errors import ConfigError, DataError, NumericsError
from maedistill.evaluation import accuracy as module
from maedistill.evaluation import full_pass
from maedistill.evaluation.accuracy import Evaluation, TopCounts, write_predictions
from maedistill.evaluation.accuracy import evaluate as evaluate_all
from maedistill.evaluation.context import EvalContext
from maedistill.evaluation.full_pass import Predictor
from maedistill.evaluation.scorecard import ScoreSpec, score
from maedistill.processes import distributed
from maedistill.study import results

INPUT = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.25)}


def network(num_classes=12) -> nn.Module:
    """A ViT of 24 px whose best class differs from image to image."""
    torch.manual_seed(0)
    shape = {"img_size": 24, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "global_pool": "avg"}
    vit = timm.create_model("vit_tiny_patch16_224", **shape, num_classes=num_classes, drop_path_rate=0.5)
    nn.init.normal_(vit.patch_embed.proj.weight)
    nn.init.normal_(vit.head.weight, std=0.2)
    return vit


def evaluate(vit, images, *, batch, precision="fp32") -> Evaluation:
    context = EvalContext(torch.device("cpu"), batch, workers=0, precision=precision)
    return evaluate_all(Predictor(vit, context, **INPUT), images, context)


def images_of(shards, samples) -> EvaluationImages:
    return EvaluationImages(open_index(str(shards / "train-*.tar")), samples, evaluation_transform(size=24, crop=0.8))


@pytest.fixture(scope="module")
def samples():
    """95 of the 96 images, in disorder: a number that no batch size divides but 1 and 5."""
    return torch.randperm(96, generator=torch.Generator().manual_seed(0))[:95]


@pytest.fixture(scope="module")
def oracle(shards, samples):
    """One image after the other: tarfile, Pillow, timm's own transform."""
    vit, logits, labels = network().eval(), [], []
    transform = create_transform(24, crop_pct=0.8, interpolation="bicubic", **INPUT)
    for i in sorted(samples.tolist()):
        with tarfile.open(shards / f"train-{i // 24:06d}.tar") as tar:
            key = [name for name in tar.getnames() if name.endswith(".png")][i % 24].removesuffix(".png")
            image, label = (tar.extractfile(key + suffix) for suffix in (".png", ".cls"))
            logits.append(vit(transform(Image.open(image).convert("RGB"))[None]).detach()[0])
            labels.append(int(label.read()))
    return torch.stack(logits), torch.tensor(labels)  # [n, C], [n]


@pytest.mark.parametrize("batch", [1, 7, 64, 1000])
def test_every_image_is_judged_once_as_timm_would(shards, samples, oracle, batch):
    logits, labels = oracle
    found = evaluate(network(), images_of(shards, samples), batch=batch)
    assert torch.equal(found.ids, samples.sort().values) and torch.equal(found.labels, labels)
    assert torch.equal(found.predictions, logits.topk(5).indices)
    torch.testing.assert_close(found.losses, F.cross_entropy(logits, labels, reduction="none"), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.confidences, logits.softmax(1).amax(1), rtol=0, atol=1e-6)
    score = found.score
    assert score.top1_correct == int((logits.argmax(1) == labels).sum())
    assert 0 < score.top1_correct < score.top5_correct < score.images == 95
    assert score.loss == pytest.approx(float(F.cross_entropy(logits, labels)), abs=1e-6)
    assert score.line().startswith(f"top-1 {100 * score.top1:.2f} % ({score.top1_correct} of 95), top-5 ")


@pytest.mark.parametrize(("count", "world_size", "batch"), [(95, 2, 7), (95, 3, 64), (5, 3, 2), (1, 4, 8), (2, 5, 1)])
def test_ranks_together_judge_each_image_once(shards, samples, ranks, count, world_size, batch):
    vit, images, passes = network().eval(), images_of(shards, samples[:count]), []
    alone = evaluate(vit, images, batch=batch)
    vit.register_forward_hook(lambda _, inputs, __: passes.append(len(inputs[0])))
    everywhere = ranks(world_size).run(lambda: evaluate(vit, images, batch=batch))
    assert len(everywhere) == world_size
    for found in everywhere:
        for name in ("ids", "labels", "predictions"):
            assert torch.equal(getattr(found, name), getattr(alone, name)), name
        # Kernels round by an image's place in its batch.
        torch.testing.assert_close(found.losses, alone.losses, rtol=1e-6, atol=1e-6)
    assert len(set(passes)) == 1 and len(passes) % world_size == 0, "passes of one shape, equally many on all ranks"


def test_a_row_too_many_is_noticed(shards, samples, monkeypatch):
    monkeypatch.setattr(distributed, "all_gather_rows", lambda part: torch.cat([part, part[:1]]))
    with pytest.raises(AssertionError, match="not those that were asked for"):
        evaluate(network(), images_of(shards, samples), batch=8)
    monkeypatch.undo()
    with pytest.raises(AssertionError, match="asked for twice"):
        evaluate(network(), images_of(shards, torch.tensor([3, 3])), batch=8)


def test_every_module_is_in_evaluation_mode_and_then_in_its_own_again(shards):
    vit, seen = network(), []
    vit.train()
    vit.blocks[0].eval()
    modes = [part.training for part in vit.modules()]
    vit.register_forward_hook(lambda *_: seen.append(any(part.training for part in vit.modules())))
    found = evaluate(vit, images_of(shards, torch.arange(5)), batch=2)
    assert seen == [False] * 3 and [part.training for part in vit.modules()] == modes
    assert not found.losses.requires_grad


class Constant(nn.Module):
    """Says the same of every image."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, images):
        return self.logits.expand(len(images), -1)


def test_of_equal_logits_the_lower_classes_are_best(shards):
    found = evaluate(Constant([0.0, 2.0, 2.0, 0.0, 0.0, 0.0]), images_of(shards, torch.arange(96)), batch=64)
    assert found.predictions.unique(dim=0).tolist() == [[1, 2, 0, 3, 4]]
    assert TopCounts.of(found.predictions, found.labels) == TopCounts(96, 32, 96)


def test_fewer_than_five_classes(shards):
    found = evaluate(Constant([0.0, 0.0, 1.0]), images_of(shards, torch.arange(96)), batch=64)
    assert found.predictions.shape == (96, 3) and TopCounts.of(found.predictions, found.labels) == TopCounts(96, 32, 96)


def test_half_precision_is_autocast(shards, samples, oracle):
    seen, vit = [], network()
    vit.head.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    found = evaluate(vit, images_of(shards, samples), batch=64, precision="bf16")
    expected = F.cross_entropy(*oracle, reduction="none")
    assert set(seen) == {torch.bfloat16} and found.losses.dtype == torch.float32
    assert 1e-4 < float((found.losses - expected).abs().max()) < 0.2


def test_a_label_that_is_no_class_of_the_model_is_refused(shards):
    with pytest.raises(DataError, match=r"the model has 2 classes, 0 to 1, but 32 of 96 .*train-000000.tar:.* with 2"):
        evaluate(network(num_classes=2), images_of(shards, torch.arange(96)), batch=8)


def test_a_loss_that_is_not_finite_is_refused(shards):
    with pytest.raises(NumericsError, match=r"of 96 of 96 images is not finite, first .*train-000000.tar:"):
        evaluate(Constant([0.0, float("nan"), 0.0]), images_of(shards, torch.arange(96)), batch=8)


@pytest.mark.parametrize("count", [1, 2])
def test_an_image_that_cannot_be_decoded_is_left_out_and_named(bad_index, ranks, count, tmp_path, capsys):
    vit, name = network(), f"{bad_index.shards[0]}:{bad_index.key(1)}"
    images = EvaluationImages(bad_index, torch.arange(3), evaluation_transform(size=24, crop=1.0))
    alone = evaluate(vit, images.with_samples(torch.tensor([0, 2])), batch=2)
    capsys.readouterr()
    for found in ranks(count).run(lambda: evaluate(vit, images, batch=2)):
        assert found.ids.tolist() == [0, 2] and found.bad_ids.tolist() == [1]
        assert found.score.images == 2 and found.score.metrics()["bad_images"] == 1
        torch.testing.assert_close(found.losses, alone.losses)
    assert capsys.readouterr().err.count(name) == 1
    write_predictions(tmp_path / "p.csv", found, bad_index)
    with (tmp_path / "p.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["id"], row["label"], bool(row["loss"]), bool(row["top1"])) for row in rows] == [
        ("0", "0", True, True), ("1", "0", False, False), ("2", "1", True, True),
    ]  # fmt: skip
    assert results._read_correct(tmp_path / "p.csv").keys() == {"0", "2"}


@pytest.mark.parametrize(("samples", "share"), [([1], 0.001), ([0, 1, 2], 0.0)])
def test_too_many_images_that_cannot_be_decoded_end_the_evaluation(bad_index, samples, share):
    context = EvalContext(torch.device("cpu"), 2, workers=0, max_bad_fraction=share)
    images = EvaluationImages(bad_index, torch.tensor(samples), evaluation_transform(size=24, crop=1.0))
    with pytest.raises(DataError) as raised:
        evaluate_all(Predictor(network(), context, **INPUT), images, context)
    assert f"{bad_index.shards[0]}:{bad_index.key(1)}" in raised.value.cause
    assert "data.max_bad_fraction" in raised.value.remedy


@pytest.mark.parametrize(
    ("bad", "total", "ends"), [(4, 16, False), (5, 16, True), (10, 9_999, False), (11, 9_999, True)]
)
def test_the_bound_is_that_of_training_and_a_quarter(bad, total, ends):
    images = SimpleNamespace(samples=range(total), why_bad=str)
    context = EvalContext(torch.device("cpu"), 2, workers=0)
    with pytest.raises(DataError) if ends else nullcontext():
        full_pass.report_bad(images, torch.arange(bad), context)


def test_predictions_come_back_from_their_file(shards, samples, tmp_path):
    index = open_index(str(shards / "train-*.tar"))
    found = evaluate(network(), images_of(shards, samples), batch=64)
    write_predictions(tmp_path / "p.csv", found, index)
    with (tmp_path / "p.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    best = [[int(row[f"top{k}"]) for k in range(1, 6)] for row in rows]
    columns = {"ids": [int(row["id"]) for row in rows], "labels": [int(row["label"]) for row in rows]}
    losses = torch.tensor([float(row["loss"]) for row in rows])
    for name, values in {**columns, "predictions": best, "losses": losses}.items():
        assert torch.equal(torch.as_tensor(values), getattr(found, name)), name
    assert [row["key"] for row in rows] == [index.key(i) for i in columns["ids"]]
    assert [row["shard"] for row in rows] == [f"train-{i // 24:06d}.tar" for i in columns["ids"]]
    names = dict(enumerate("abc"))
    assert [(r["label_name"], r["top1_name"]) for r in rows] == [
        (names[int(r["label"])], names.get(int(r["top1"]), "")) for r in rows
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["p.csv"]


def test_a_predictions_file_is_written_whole_or_not_at_all(shards, tmp_path, monkeypatch):
    index = open_index(str(shards / "train-000000.tar"))
    found = Evaluation(
        torch.arange(2),
        torch.zeros(2, dtype=torch.int64),
        torch.zeros(2, 3, dtype=torch.int64),
        torch.ones(2),
        torch.ones(2),
    )
    (tmp_path / "p.csv").write_text("before")
    monkeypatch.setattr(module.csv, "writer", lambda *_, **__: pytest.fail("stopped half-way"))
    with pytest.raises(pytest.fail.Exception):
        write_predictions(tmp_path / "p.csv", found, index)
    assert (tmp_path / "p.csv").read_text() == "before"


def test_the_size_of_a_published_accuracy_is_said_and_taken(shards, tmp_path, capsys):
    network, context = timm.create_model("resnet10t", num_classes=12), EvalContext(torch.device("cpu"), 24, workers=0)
    config = {"input_size": (3, 32, 32), "crop_pct": 0.9, "test_input_size": (3, 48, 48), "test_crop_pct": 1.0}
    save_for_hf(network, tmp_path / "model", data_config=config, safe_serialization=True)

    def ask(**size):
        spec = ScoreSpec(str(tmp_path / "model"), str(shards / "val-*.tar"), latency=False, **size)
        return score(spec, context, files={})

    own = ask()
    assert (own["size"], own["crop"]) == (32, 0.9) and "48 px, crop 1: --test-size" in capsys.readouterr().out
    published = ask(test_size=True)
    assert (published["size"], published["crop"]) == (48, 1.0) and "--test-size" not in capsys.readouterr().out
    assert published["loss"] == ask(image_size=48, crop=1.0)["loss"] != own["loss"]
    with pytest.raises(ConfigError, match="both name the size"):
        ask(test_size=True, image_size=32)
    same = {"test_input_size": config["input_size"], "test_crop_pct": config["crop_pct"]}
    save_for_hf(network, tmp_path / "model", data_config=config | same, safe_serialization=True)
    with pytest.raises(ConfigError, match="states no other size"):
        ask(test_size=True)
