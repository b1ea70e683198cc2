"""Fine-tuning end to end, in real processes: what a run leaves, and that layout, kills and restarts change nothing.

`tuned` (tests/conftest.py) is the reference where everything random is on; mixing and drop path draw per rank, so only
runs of one rank compare with it. `plain` has RandAugment alone: there ranks, ZeRO stages and accumulation must not
change the numbers, up to the order of sums.
"""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from maedistill.config.finetune import FinetuneConfig
from maedistill.config.loader import load_config
from maedistill.data.loading.evaluation import EvaluationImages, evaluation_transform
from maedistill.data.loading.order import label_subset
from maedistill.data.shards.open_index import open_index
from maedistill.data.shards.sources import open_folder
from maedistill.data.shards.write import make_shards
from maedistill.evaluation.accuracy import evaluate
from maedistill.evaluation.context import EvalContext
from maedistill.evaluation.full_pass import Predictor
from maedistill.finetuning.setup import open_finetuning
from maedistill.weights.open_network import open_network
from tests.conftest import FINETUNE_CONFIG, SCRATCH, two_at_a_time
from tests.faults.notes import same_result, witnessed

EPOCH = 8  # steps
PLAIN = ["augment.mixup=0", "augment.cutmix=0", "augment.erasing=0", "student.drop_path=0", "optim.ema=null"]
PLAIN += ["optim.epochs=2"]
LAYOUTS = {
    "two ranks, zero 2": ["engine.zero=2", "data.workers=1"],
    "two ranks, zero 3, accumulation 3": ["engine.zero=3", "engine.micro_batch=2"],
}
SEEN = ("samples", "crops", "images", "targets")  # what a witness notes: of images, as the network reads them
COLOURS = [*SCRATCH, "student.global_pool=token", "augment.rand_augment=null", "optim.epochs=5"]


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Shards of three classes that differ in their strongest colour, noisy."""
    pictures, out = tmp_path_factory.mktemp("colours"), tmp_path_factory.mktemp("coloured") / "shards"
    draws = np.random.default_rng(0)
    for split, count in (("train", 96), ("val", 24)):
        for i in range(count):
            pixels = draws.normal(100, 40, (32, 32, 3)) + 60 * np.eye(3)[i % 3]
            file = pictures / split / "rgb"[i % 3] / f"{i:03d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file)
    make_shards(open_folder(pictures), out)
    return out


@pytest.mark.parametrize(
    ("more", "size", "said"),
    [
        (["data.image_size=null"], 32, "at 32 px (as its start)"),
        (["data.image_size=16"], 16, "at 16 px (its start: 32 px, resampled)"),
        (["data.image_size=null", "init.source=null", "student.model=vit_tiny_patch16_224"], 224, "at 224 px, "),
    ],
)
def test_the_image_size_is_that_of_the_start_unless_it_is_given(finetuning, mae, tmp_path, shards, more, size, said):
    file = tmp_path / "a.yaml"
    file.write_text(FINETUNE_CONFIG.format(shards=shards))
    config = load_config(file, [f"init.source={mae.run}", f"run={tmp_path}/r", *more], root=FinetuneConfig).config
    parts = open_finetuning(config, world_size=1, device=torch.device("cpu"))
    assert parts.config.data.image_size == parts.metadata["input"]["size"] == size
    assert parts.module.vit.patch_embed.img_size == (size, size)
    assert said in next(line for line in parts.summary_lines if line.startswith("data "))


@pytest.fixture(scope="module")
def runs(finetuning, mae, tuned, colours):
    """All other runs of this file by name, two at a time."""
    source = f"init.source=run:{mae.run}"
    larger = ["data.image_size=64", "data.label_fraction=0.5", "optim.epochs=2", f"init.source=run:{tuned.run}"]
    data = [f"data.train={colours}/train-*.tar", f"data.val={colours}/val-*.tar"]

    def layout(name):
        folder = name.replace(" ", "-").replace(",", "")
        return finetuning(folder, source, *PLAIN, *LAYOUTS[name], ranks=2, witness=True)

    starts = {name: lambda name=name: layout(name) for name in LAYOUTS} | {
        "plain": lambda: finetuning("plain", source, *PLAIN, witness=True),
        "zero 1": lambda: finetuning("zero-1", source, "engine.zero=1", witness=True),
        "larger": lambda: finetuning("larger", *larger, witness=True),
        "colours": lambda: finetuning("colours", *data, *COLOURS),
    }
    return two_at_a_time(lambda name: starts[name](), starts)


def rates(run: Path, *, micro: int) -> list[list[float]]:
    """The learning rate of each parameter group at each step, as rank 0 has them."""
    notes = [json.loads(line)["rates"] for line in (run / "witness-0.jsonl").read_text().splitlines()]
    assert all(notes[i] == notes[i - i % micro] for i in range(len(notes))), "rates change inside a step"
    return notes[::micro]


def evaluations(ended) -> list[dict]:
    """The records of metrics.jsonl that evaluations left."""
    return [record for record in ended.records() if "loss" not in record]


def test_a_run_leaves_a_complete_folder(tuned):
    run, steps = tuned.run, tuned.metrics()
    assert tuned.err == "" and "step 24/24" in tuned.out
    assert json.loads((run / "exit.json").read_text()) == {"exit_code": 0, "reason": "finished", "step": 24}
    metadata = json.loads((run / "run.json").read_text())
    assert metadata["input"] == {"size": 32, "mean": [0.5] * 3, "std": [0.25] * 3, "crop": 1.0, "exif": "ignore"}, (
        "as its source's"
    )
    assert metadata["classes"] == ["a", "b", "c"] and metadata["origin"]["method"] == "mae"
    assert len(steps) == 24 and all(np.isfinite(record["loss"]) for record in steps)
    assert [(record["step"], "ema_top1" in record) for record in evaluations(tuned)] == [
        (step, averaged) for step in (8, 16, 24) for averaged in (False, True)
    ]
    assert all(record.get("images", 24) == record.get("ema_images", 24) == 24 for record in evaluations(tuned))
    with Image.open(run / "pictures" / "input.png") as sheet:
        assert sheet.width == (196 + 24) * 6 - 24 + 4  # cells of 192 px and their gaps
        assert len(sheet.getcolors(1 << 20)) > 6 * 32
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step_000000016", "step_000000024"}


def test_what_was_measured_is_what_the_checkpoint_does(tuned, shards):
    """The weights and their moving average, opened as strangers would, give the counts of the last evaluation."""
    index = open_index(f"{shards}/val-*.tar")
    images = EvaluationImages(index, torch.arange(24), evaluation_transform(size=32, crop=1.0))
    for weights, recorded, prefix in (("model", -2, ""), ("ema", -1, "ema_")):
        opened, record = open_network(str(tuned.run), "classifier", weights=weights), evaluations(tuned)[recorded]
        context = EvalContext(torch.device("cpu"), batch=6, workers=0)
        found = evaluate(Predictor(opened.module, context, mean=opened.mean, std=opened.std), images, context)
        assert record[f"{prefix}top1_correct"] == found.score.top1_correct
        assert record[f"{prefix}val_loss"] == pytest.approx(found.score.loss, rel=1e-6)
    assert evaluations(tuned)[-2]["val_loss"] != evaluations(tuned)[-1]["ema_val_loss"]


def test_the_report_repeats_the_metrics_and_names_what_went_in(tuned, mae):
    text, (score, averaged), last = (tuned.run / "report.md").read_text(), evaluations(tuned)[-2:], tuned.metrics()[-1]
    assert f"**top-1 {100 * score['top1']:.2f} % ({score['top1_correct']} of 24)**" in text
    assert f"loss {score['val_loss']:.4f}" in text
    assert f"moving average: top-1 {100 * averaged['ema_top1']:.2f} % ({averaged['ema_top1_correct']} of 24)" in text
    assert f"start: run:{mae.run} {mae.last_checkpoint().name}  32 x 2" in text
    assert "yours: no other weights were used" in text
    assert f"3 epochs of 96 images, {last['step']} steps, global batch 12, lr 0.003, layer decay 0.5, seed 0" in text
    assert text.rstrip().endswith(f"maedistill export {tuned.run}")
    assert (tuned.run / re.search(r"!\[.*\]\((.*)\)", text)[1]).read_bytes().startswith(b"\x89PNG")


@pytest.mark.faults
def test_a_killed_run_goes_on_bit_by_bit(finetuning, mae, tuned):
    """RandAugment, erasing, mixing and drop path on, with other loader processes than the reference had.

    Killed in the second half of step 21, 5 steps after its checkpoint.
    """
    command = ["killed", f"init.source=run:{mae.run}", "data.workers=2"]
    before = finetuning(*command, witness=True, code=-9, WITNESS_KILL="42")
    assert before.last_checkpoint().name == "step_000000016" and len(before.metrics()) == 20
    ended = finetuning(*command)
    assert "continues at step 16 of 24" in ended.out
    same_result(ended.run, tuned.run)


def test_layouts_see_the_same(runs, tuned):
    plain, mixed = witnessed(runs["plain"].run, *SEEN), witnessed(tuned.run, *SEEN)
    assert list(plain) == list(range(12 * 2 * EPOCH)) and list(mixed) == list(range(12 * 3 * EPOCH))
    for layout in LAYOUTS:
        seen = witnessed(runs[layout].run, *SEEN)
        assert {position: seen[position] for position in sorted(seen)} == plain
    assert all(mixed[position][:2] == plain[position][:2] for position in plain), "crops know nothing of what follows"
    assert sum(mixed[position][2] == plain[position][2] for position in plain) < 10
    assert len({crop for _, crop, _, _ in mixed.values()}) > 0.95 * len(mixed), "each epoch crops anew"


def test_targets_are_the_samples_labels(runs, tuned, shards):
    labels = open_index(f"{shards}/train-*.tar").labels
    plain, mixed = witnessed(runs["plain"].run, *SEEN), witnessed(tuned.run, *SEEN)
    for sample, _, _, target in plain.values():
        assert target == pytest.approx(np.where(np.arange(3) == labels[sample], 0.9 + 0.1 / 3, 0.1 / 3), abs=1e-6)
    targets = np.array([target for *_, target in mixed.values()])  # [P, C]
    assert targets.sum(1) == pytest.approx(1, abs=1e-5)
    assert (np.sort(targets)[:, 1] > 0.1).mean() > 0.3, "two classes, where the partner is of another one"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_lose_and_score_the_same(runs, layout):
    compare(runs[layout], runs["plain"])
    micro = {"two ranks, zero 2": 1, "two ranks, zero 3, accumulation 3": 3}[layout]
    assert rates(runs[layout].run, micro=micro) == rates(runs["plain"].run, micro=2)


def test_zero_changes_no_layer_s_rate(runs, tuned):
    compare(runs["zero 1"], tuned)
    expected = rates(tuned.run, micro=2)
    assert rates(runs["zero 1"].run, micro=2) == expected
    scales = [0.5**layer for layer in (3, 2, 1, 0)]  # patches and tokens, two blocks, head
    assert sorted(set(expected[4])) == pytest.approx([3e-3 * scale for scale in scales], rel=1e-12)
    assert "layers   lr times 0.5 a layer, head to patches: 0.003 0.0015 0.00075 0.000375" in tuned.out


def compare(ended, reference) -> None:
    """Losses, gradient norms and evaluations up to the order of sums, which grows: 1e-5 holds for 20 steps."""
    for ours, theirs in zip(ended.metrics()[:20], reference.metrics()[:20], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5, rel=0), ours["step"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    for ours, theirs in zip(evaluations(ended), evaluations(reference), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    ours, theirs = (load_file(e.last_checkpoint() / "model.safetensors") for e in (ended, reference))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if not name.endswith("qkv.bias"):  # attention ignores the keys' bias: Adam makes steps of its rounding errors
            torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-3)


def test_a_label_subset_is_all_that_is_seen_at_twice_the_resolution(runs, tuned, shards):
    """Half of each class, on from a fine-tuned run of 32 px: its positions are resampled, its head is new."""
    ended = runs["larger"]
    subset = label_subset(open_index(f"{shards}/train-*.tar").labels, 0.5, seed=0).tolist()
    assert Counter(sample for (sample,) in witnessed(ended.run, "samples").values()) == {sample: 2 for sample in subset}
    for line in ("48 images (50 % of each class) at 64 px", "8 = floor(2 epochs x 48 / 12)", "1 resampled (pos_embed)"):
        assert line in ended.out
    metadata = json.loads((ended.run / "run.json").read_text())
    assert (metadata["data"]["images"], metadata["input"]["size"], metadata["origin"]["stage"]) == (48, 64, "finetune")
    assert load_file(ended.last_checkpoint() / "model.safetensors")["vit.pos_embed"].shape == (1, 65, 32)
    assert [record["step"] for record in evaluations(ended) if "top1" in record] == [4, 8]


def test_labels_are_learned(runs):
    """From scratch, by the class token, in 40 steps with mixing on; chance is 8 of 24 and log 3 = 1.0986."""
    score = [record for record in evaluations(runs["colours"]) if "top1" in record][-1]
    assert score["top1_correct"] >= 20 and score["val_loss"] < 0.8
