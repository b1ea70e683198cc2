"""Stored predictions as teacher: which row reads what, plain cross-entropy before, ranks, and a kill."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from maedistill.config.distill import PastConfig
from maedistill.config.plan import BatchPlan, Plan
from maedistill.data.loading.batch import Batch
from maedistill.data.loading.order import SampleOrder
from maedistill.errors import ConfigError, DataError
from maedistill.finetuning.predictions import Predictions
from maedistill.losses.self_distillation import past_target
from tests.conftest import SCRATCH
from tests.faults.notes import same_result

IMAGES, BATCH, STEPS, EPOCHS, CLASSES = 10, 4, 9, 3.6, 5
ORDER = SampleOrder(np.array([0, IMAGES]), seed=3)
DAMAGED = {6: 3, 17: 12}  # positions whose sample does not decode, and the positions of those that stand in
NOT_FINITE = 14

PLAIN = [*SCRATCH, "student.drop_path=0", "augment.mixup=0", "augment.cutmix=0", "augment.erasing=0"]
# An epoch is 5 1/3 steps, so that steps cross its border; checkpoints are in the middle of epochs, too.
PLAIN += ["optim.global_batch=18", "engine.micro_batch=9", "log.save_every_epochs=0.75"]
PSKD = [*PLAIN, "distill.label_weight=0", "distill.past={weight: 1, source: predictions}"]


def opened(folder, *, step: int = 0, **settings) -> Predictions:
    section = PastConfig(weight=1, source="predictions", **settings)
    plan = Plan(BatchPlan(BATCH, 1), world_size=1, images=IMAGES, steps=STEPS, warmup_steps=0)
    made = Predictions(section, plan=plan, epochs=EPOCHS, samples=IMAGES, num_classes=CLASSES)
    there = SimpleNamespace(path=folder, checkpoints=folder / "checkpoints")
    made.begin(SimpleNamespace(folder=there, step=step, before_save=[]), ORDER)
    return made


def batch(step: int) -> Batch:
    positions = torch.arange(step * BATCH, (step + 1) * BATCH)
    samples = ORDER.samples(torch.tensor([DAMAGED.get(at, at) for at in positions.tolist()]))
    return Batch(torch.empty(BATCH, 0), positions, torch.zeros(BATCH), samples)


def said(position: int) -> torch.Tensor:
    """What the network predicts at a position: [C]."""
    logits = 3 * torch.randn(CLASSES, generator=torch.Generator().manual_seed(position))
    return torch.full_like(logits, torch.nan) if position == NOT_FINITE else logits.softmax(dim=0)


def train(predictions: Predictions, steps: range) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The predictions and shares that each step reads; every second step is saved."""
    read = []
    for step in steps:
        given = batch(step)
        outputs = predictions.outputs(given.images, step, batch=given, now=torch.nn.Identity())
        read.append(
            (outputs["past"], outputs["share"]) if outputs else (torch.zeros(BATCH, CLASSES), torch.zeros(BATCH, 1))
        )
        predictions.add(given, {"predictions": torch.stack([said(at) for at in given.positions.tolist()])})
        if step % 2:
            predictions.sync(step + 1)
    return read


@pytest.mark.parametrize("top_k", [None, 1])
def test_a_row_reads_what_was_said_of_its_sample_in_the_whole_epoch_before(tmp_path, top_k):
    ids, shares = ORDER.samples(torch.arange(STEPS * BATCH)).tolist(), set()
    for step, (past, share) in enumerate(train(opened(tmp_path, top_k=top_k), range(STEPS))):
        given = batch(step)
        for row, (at, sample) in enumerate(zip(given.positions.tolist(), given.samples.tolist(), strict=True)):
            epoch = at // IMAGES
            before = [p for p in range((epoch - 1) * IMAGES, epoch * IMAGES) if p >= 0 and ids[p] == sample]
            usable = before and before[0] not in {*DAMAGED, NOT_FINITE} and epoch * IMAGES <= step * BATCH
            assert float(share[row]) == pytest.approx(0.8 * min(1, (epoch + 1) / EPOCHS) if usable else 0)
            expected = said(before[0]).half().double() if usable else torch.zeros(CLASSES)
            if usable and top_k:
                least = expected.argsort()[:-top_k]
                expected[least] = 0
                expected[least] = (1 - expected.sum()) / (CLASSES - top_k)
            torch.testing.assert_close(
                past[row].double(), expected.double() / (expected.sum() or 1), rtol=1e-5, atol=1e-6
            )
            shares.add(round(float(share[row]), 4))
        hard = torch.eye(CLASSES)[:BATCH]
        mixed = past_target(hard, past, alpha=share)
        assert torch.equal(mixed[share[:, 0] == 0], hard[share[:, 0] == 0])
        torch.testing.assert_close(mixed.sum(dim=1), torch.ones(BATCH))
    assert shares == {0, *(round(0.8 * min(1, e / EPOCHS), 4) for e in (2, 3, 4))}


def test_a_restart_reads_the_same_and_finds_what_it_needs(tmp_path):
    """Step 4 is in epoch 1, of which the checkpoint has rows: it needs epochs 0 and 1."""
    reference = train(opened(tmp_path / "whole"), range(STEPS))
    (tmp_path / "cut" / "checkpoints" / "step_000000004").mkdir(parents=True)
    train(opened(tmp_path / "cut"), range(STEPS))
    files = tmp_path / "cut" / "predictions"
    assert sorted(int(path.stem[6:]) for path in files.iterdir()) == [0, 1, 2, 3]
    assert sorted(int(path.stem[6:]) for path in (tmp_path / "whole" / "predictions").iterdir()) == [2, 3]
    again = train(opened(tmp_path / "cut", step=4), range(4, STEPS))
    for (past, share), (same_past, same_share) in zip(reference[4:], again, strict=True):
        assert torch.equal(past, same_past) and torch.equal(share, same_share)
    size = (files / "epoch_000001.f16").stat().st_size
    assert size == IMAGES * CLASSES * 2
    with (files / "epoch_000001.f16").open("ab") as file:
        file.truncate(size - 1)
    with pytest.raises(DataError, match=r"epoch_000001.f16 has 99 of 100 bytes"):
        opened(tmp_path / "cut", step=4)
    opened(tmp_path / "cut", step=0)  # needs nothing
    opened(tmp_path / "cut", step=STEPS)  # the end
    resting = opened(tmp_path / "rests", start_epoch=2)  # in epochs 0 and 1, nothing reads
    assert [float(share.max()) > 0 for _, share in train(resting, range(STEPS))] == [False] * 5 + [True] * 4


def test_the_disk_is_that_of_all_samples_though_a_run_trains_on_a_part():
    plan = Plan(BatchPlan(BATCH, 1), world_size=1, images=IMAGES, steps=STEPS, warmup_steps=0)
    section = PastConfig(weight=1, source="predictions")
    for samples, told in ((96, "0.96 kB"), (50_000, "500 kB"), (1_281_167, "12.8 MB"), (400_000_000, "4.00 GB")):
        made = Predictions(section, plan=plan, epochs=EPOCHS, samples=samples, num_classes=CLASSES)
        assert f"predictions: {told} per epoch" in made.describe()


def test_a_selection_that_saves_nothing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="top_k"):
        opened(tmp_path, top_k=2)


@pytest.fixture(scope="module")
def trained(finetuning):
    """Two ranks, 16 steps."""
    return finetuning("pskd", *PSKD, ranks=2)


def rows(run) -> dict[str, np.ndarray]:
    """The stored probabilities by file, [96, 3]."""
    files = sorted((run.run / "predictions").glob("*.f16"))
    return {path.stem: np.fromfile(path, np.float16).reshape(96, 3).astype(np.float32) for path in files}


def test_the_first_epoch_is_plain_cross_entropy_bit_for_bit(finetuning, trained):
    """In step 6, which crosses into epoch 1, the rows beyond it have no past either."""
    plain = [record["loss"] for record in finetuning("pskd-plain", *PLAIN, ranks=2).metrics()]
    losses = [record["loss"] for record in trained.metrics()]
    assert losses[:6] == plain[:6] and not set(losses[6:]) & set(plain[6:])
    assert "0.58 kB per epoch" in trained.out


def test_one_rank_and_two_write_the_same_file(finetuning, trained):
    """Byte for byte: one rank adds two micro-batches, two ranks one each, and a sum of two has one order."""
    alone, two = rows(finetuning("pskd-alone", *PSKD)), rows(trained)
    assert alone.keys() == two.keys() >= {"epoch_000001", "epoch_000002"}
    for name, found in two.items():
        assert found.tobytes() == alone[name].tobytes(), name
        np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-3)
    assert np.ptp(two["epoch_000002"], axis=0).min() > 0.03


@pytest.mark.faults
def test_a_killed_run_repeats_every_bit(finetuning, trained):
    """Killed in step 12, in epoch 2. The checkpoint of step 8 is of epoch 1, and goes on with epoch 0."""
    finetuning("pskd-killed", *PSKD, ranks=2, witness=True, code=-9, WITNESS_KILL="12")
    folder = finetuning.folder / "pskd-killed" / "predictions"
    (folder / "epoch_000000.f16").rename(folder / "aside")
    refused = finetuning("pskd-killed", *PSKD, ranks=2, code=3)
    assert "epoch_000000.f16 has 0 of 576 bytes, and step 8" in refused.err
    (folder / "aside").rename(folder / "epoch_000000.f16")
    again = finetuning("pskd-killed", *PSKD, ranks=2)
    assert "continues at step 8 of 16" in again.out
    same_result(again.run, trained.run)
    found, expected = rows(again), rows(trained)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in found)
