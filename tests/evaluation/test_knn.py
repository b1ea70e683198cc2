"""kNN against scikit-learn, and pooled features: each sample once, in order, in evaluation mode."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import timm
import torch
from sklearn.neighbors import KNeighborsClassifier

from maedistill.data.images.decode import decode_rgb
from maedistill.data.shards.open_index import open_index
from maedistill.data.shards.reader import ShardReader
from maedistill.errors import ConfigError
from maedistill.evaluation import feature_eval
from maedistill.evaluation import knn as module
from maedistill.evaluation.context import EvalContext
from maedistill.evaluation.features import pooled_features, random_subset
from maedistill.evaluation.knn import knn_accuracy, knn_counts, knn_predictions
from maedistill.methods.mae import MAE, PixelSpec
from maedistill.models.decoder import TokenDecoder
from maedistill.models.encoder import MaskedEncoder
from maedistill.models.initialize import initialize
from maedistill.models.vits import build_vit
from maedistill.processes import distributed
from maedistill.weights.backbone import Backbone
from maedistill.weights.open_network import given_network

CPU = torch.device("cpu")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)


def context(batch, precision="fp32") -> EvalContext:
    return EvalContext(CPU, batch, workers=0, precision=precision)


def method(**overrides) -> MAE:
    shape = {"width": 32, "depth": 2, "num_heads": 2, "patch_size": 8} | overrides
    encoder = MaskedEncoder(build_vit("vit_tiny_patch16_224", image_size=32, register_tokens=2, **shape))
    decoder = TokenDecoder(32, width=16, depth=1, num_heads=2, grid=4, patch_size=8, num_prefix=3)
    built = MAE(encoder, decoder, pixels=PixelSpec(MEAN, STD))
    initialize(built, seed=0)
    return built


@pytest.mark.parametrize(("temperature", "part"), [(0.07, 10_000), (0.07, 37), (1.0, 64), (0.001, 5)])
def test_predictions_are_those_of_scikit_learn_whatever_the_parts(monkeypatch, temperature, part):
    """KNeighborsClassifier by cosine with the same weights, in float64 and with the whole matrix at once."""
    draws = torch.Generator().manual_seed(0)
    centres = torch.randn(9, 16, generator=draws)
    bank_labels, truth = (torch.randint(9, (n,), generator=draws) for n in (400, 300))
    bank, queries = (centres[t] + 2 * torch.randn(len(t), 16, generator=draws) for t in (bank_labels, truth))
    monkeypatch.setattr(module, "_QUERIES", part)
    monkeypatch.setattr(module, "_BANK", part)
    ks = [1, 7, 50, 400]
    found = knn_predictions((bank, bank_labels), queries, ks=ks, temperature=temperature)
    assert found.shape == (4, 300)
    for k, predictions in zip(ks, found, strict=True):
        oracle = KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp(-distance / temperature)
        )
        expected = oracle.fit(bank.double().numpy(), bank_labels.numpy()).predict(queries.double().numpy())
        assert predictions.tolist() == expected.tolist(), k
    assert len({tuple(row) for row in found.tolist()}) > 1 or temperature < 0.01, "k must matter"


def test_no_matrix_grows_with_the_bank_or_the_queries(monkeypatch):
    normalize, sizes = module.F.normalize, []
    monkeypatch.setattr(module, "_QUERIES", 5)
    monkeypatch.setattr(module, "_BANK", 7)
    monkeypatch.setattr(module.F, "normalize", lambda rows, dim: sizes.append(len(rows)) or normalize(rows, dim=dim))
    knn_predictions((torch.randn(100, 4), torch.arange(100)), torch.randn(50, 4), ks=[20])
    assert max(sizes) == 7 and sizes.count(5) == 10, "queries five by five, the bank seven by seven"


def test_knn_allows_classes_that_only_one_side_has():
    bank, queries = (torch.eye(3), torch.tensor([0, 1, 1])), (torch.eye(3), torch.tensor([0, 1, 9]))
    assert knn_accuracy(bank, queries, k=1, device=CPU) == pytest.approx(2 / 3)


@pytest.mark.parametrize(("count", "world_size"), [(50, 1), (50, 3), (2, 4)])
def test_ranks_share_the_queries_and_count_each_once(monkeypatch, count, world_size):
    """One rank after the other, as if all had the same share of the sum; their counts are added up here."""
    draws = torch.Generator().manual_seed(0)
    rows, queries = torch.randn(60, 8, generator=draws), torch.randn(count, 8, generator=draws)
    bank, truth = (rows, torch.arange(60) % 3), torch.arange(count) % 3
    expected = [int((found == truth).sum()) for found in knn_predictions(bank, queries, ks=[1, 9])]
    assert all(expected) or count < 3
    work, seen, total = module.knn_predictions, [], torch.zeros(2, dtype=torch.int64)

    def noting(bank, queries, **keywords):
        seen.append(len(queries))
        return work(bank, queries, **keywords)

    monkeypatch.setattr(module, "knn_predictions", noting)
    monkeypatch.setattr(distributed, "world_size", lambda: world_size)
    monkeypatch.setattr(distributed, "all_gather_rows", lambda part: part)
    for rank in range(world_size):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        total += torch.tensor(knn_counts(bank, (queries, truth), ks=[1, 9], device=CPU))
    assert total.tolist() == expected
    assert sum(seen) == count and max(seen) - min(seen) <= 1, "nobody does the work of all"


def test_a_spread_of_samples_is_fixed_and_has_each_once(shards):
    index = open_index(str(shards / "train-*.tar"))
    assert random_subset(index, 1000).sort().values.tolist() == list(range(96))
    some = random_subset(index, 20)
    assert len(set(some.tolist())) == 20 and torch.equal(some, random_subset(index, 20))
    assert len({index.shard_of(i) for i in some.tolist()}) == 4, "not the first shard alone"


def test_features_are_means_of_patch_tokens_in_evaluation_mode(shards):
    index, module = open_index(str(shards / "train-*.tar")), method(drop_path=0.5)
    samples = torch.tensor([5, 90, 7, 33, 60])
    module.train()
    rows, labels = pooled_features(module, index, samples, context(2), size=32, crop_pct=1.0)
    assert module.training and labels.tolist() == index.labels[samples].tolist() and not rows.requires_grad
    module.eval()
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    for sample, row in zip(samples.tolist(), rows, strict=True):
        image = decode_rgb(ShardReader(index).read(sample)) / 255  # 32 px: the centre crop is all of it
        tokens = module.encoder(((image - mean) / std)[None])[0][0, 3:]  # [16, D], without class and register tokens
        torch.testing.assert_close(row, tokens.mean(0).detach(), rtol=0, atol=1e-5)


def test_features_are_pooled_in_the_precision_of_the_run_and_come_in_float32(shards):
    index, network, seen = open_index(str(shards / "train-*.tar")), method(), set()
    network.encoder.vit.blocks[1].attn.qkv.register_forward_hook(lambda *call: seen.add(call[2].dtype))

    def rows(*precision):
        seen.clear()
        found, _ = pooled_features(network, index, torch.arange(9), context(4, *precision), size=32, crop_pct=1.0)
        assert found.dtype == torch.float32
        return found, seen.copy()

    plain, dtypes = rows()
    assert dtypes == {torch.float32}
    for name in ("fp32", "auto"):
        assert torch.equal(rows(name)[0], plain), "on the CPU both are fp32"
    half, dtypes = rows("bf16")
    assert dtypes == {torch.bfloat16} and 1e-4 < float((half - plain).abs().max()) < 0.1


@pytest.mark.parametrize(("count", "world_size"), [(7, 2), (8, 2), (5, 3), (1, 4), (2, 5)])
def test_ranks_together_pool_each_sample_once_in_order(shards, ranks, count, world_size):
    """Threads in place of processes; test_pretrain.py has real ranks. All run equally often."""
    index, module, samples = open_index(str(shards / "train-*.tar")), method().eval(), torch.arange(0, 9 * count, 9)
    samples, passes = samples.flip(0), []
    expected = pooled_features(module, index, samples, context(2), size=32, crop_pct=1.0)
    module.encoder.register_forward_hook(lambda _, inputs, __: passes.append(len(inputs[0])))
    everywhere = ranks(world_size).run(
        lambda: pooled_features(module, index, samples, context(2), size=32, crop_pct=1.0)
    )
    assert len(everywhere) == world_size and len(set(passes)) == 1 and len(passes) % world_size == 0
    for features, labels in everywhere:
        assert torch.equal(labels, expected[1])
        torch.testing.assert_close(features, expected[0], rtol=0, atol=1e-5)


def test_a_bad_image_is_left_out_of_a_probe(bad_index):
    module, view = method(), {"size": 32, "crop_pct": 1.0}
    rows, labels = pooled_features(module, bad_index, torch.tensor([2, 1, 0]), context(3), **view)
    alone, _ = pooled_features(module, bad_index, torch.tensor([2, 0]), context(3), **view)
    assert labels.tolist() == bad_index.labels[[2, 0]].tolist()
    torch.testing.assert_close(rows, alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("k", [2, 3])
def test_the_command_counts_what_could_be_decoded(bad_index, monkeypatch, k):
    """Training and validation images are the same three, of which the second is bad."""
    shape = {"img_size": 24, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 0}
    network = given_network(timm.create_model("vit_tiny_patch16_224", **shape), "made", image_size=24)
    backbone = Backbone(network.module, block=None, pool="mean")
    monkeypatch.setattr(feature_eval, "open_backbone", lambda *_, **__: replace(network, module=backbone))
    monkeypatch.setattr(feature_eval, "open_pair", lambda *_, **__: (bad_index, bad_index))
    spec = feature_eval.ProbeSpec("made", "train-*.tar", "val-*.tar")
    score = partial(feature_eval.score_knn, spec, context(2), ks=[k], temperature=0.07, file=None)
    if k == 3:
        with pytest.raises(ConfigError):
            score()
        return
    found = score()
    assert (found["train_bad_images"], found["val_bad_images"], found["knn"][0]["images"]) == (1, 1, 2)
    recipe = feature_eval.ProbeRecipe(epochs=1, batch=2)
    probed = feature_eval.score_probe(spec, context(2), recipe, rates=[0.3], file=None)
    assert (probed["images"], probed["bad_images"], probed["rates"][0]["bad_images"]) == (2, 1, 1)


def test_a_probe_that_fails_leaves_the_network_in_training_mode(shards):
    index, module = open_index(str(shards / "train-*.tar")), method(drop_path=0.5).train()
    module.encoder.vit.blocks[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pooled_features(module, index, torch.arange(4), context(2), size=32, crop_pct=1.0)
    assert all(part.training for part in module.modules())
