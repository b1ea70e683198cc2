"""The loader: the same samples, crops, flips and masks in any layout; bad images replaced, and errors that arrive."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from maedistill.config.plan import batch_plan
from maedistill.data.images.augment import RandAugment
from maedistill.data.images.decode import decode_rgb
from maedistill.data.images.transforms import CROP_DRAWS, crop, random_box, random_flip, to_float01
from maedistill.data.loading.batch import Batch
from maedistill.data.loading.loader import PREFETCHED, batches_ahead, training_batches
from maedistill.data.shards.open_index import open_index
from maedistill.models.masking import random_split
from maedistill.randomness import Stream, uniform
from tests.data.crops import crops_of, failure, one_rank
from tests.data.pictures import encode
from tests.data.tar_files import write_tar

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # torch's own threads
GLOBAL_BATCH, STEPS, SEED = 24, 6, 5
LAYOUTS = [(1, 0, 24), (2, 1, 6), (3, 2, 4), (4, 0, 2), (6, 1, 4)]  # ranks, workers, most samples in a micro-batch


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """Three shards of ten pictures: whole, with two damaged ones, and with nothing else."""
    folder, members = tmp_path_factory.mktemp("tars"), {}
    draws = torch.Generator().manual_seed(0)
    for i in range(10):
        pixels = torch.randint(0, 256, (20 + i, 30 - i, 3), dtype=torch.uint8, generator=draws)
        members[f"{i:03d}"] = encode(Image.fromarray(pixels.numpy()), "PNG")
    bad = {"003": members["003"][:300], "007": b"no image"}
    for name, content in (("good", members), ("some", members | bad), ("none", dict.fromkeys(members, b"x"))):
        files = [
            (f"{key}.{suffix}", part)
            for key, data in content.items()
            for suffix, part in (("png", data), ("cls", b"%d" % (int(key) % 3)))
        ]
        write_tar(folder / f"{name}.tar", files)
    return {name: open_index(str(folder / f"{name}.tar")) for name in ("good", "some", "none")}


def batches_of(crops, ranks, workers, most, first_step=0):
    """All micro-batches of all ranks: {step: [batch of each micro-batch and rank]}."""
    plan = batch_plan(GLOBAL_BATCH, most, world_size=ranks, group=crops.order.views)
    steps = {step: [] for step in range(first_step, STEPS)}
    keywords = {"plan": plan, "world_size": ranks, "workers": workers, "device": torch.device("cpu")}
    for rank in range(ranks):
        for i, batch in enumerate(training_batches(crops, first_step, STEPS, rank=rank, **keywords)):
            steps[first_step + i // plan.accumulation].append(batch)
            assert len(batch.images) == plan.micro_batch <= most
    return steps


def given(steps):
    """What the network is given, by position, as it is made on the device: sample, flipped crop, patch order."""
    seen = {}
    for batch in (batch for part in steps.values() for batch in part):
        images = random_flip(to_float01(batch.images), batch.positions, seed=SEED)
        split = random_split(batch.positions, seed=SEED, num_patches=16, num_student=4, num_teacher=8)
        for i, position in enumerate(batch.positions.tolist()):
            assert position not in seen
            seen[position] = (int(batch.samples[i]), images[i].numpy().tobytes(), split.order[i].tolist())
    return seen


@pytest.mark.parametrize(("views", "spec"), [(1, None), (2, None), (1, "rand-m9-mstd0.5-inc1")])
def test_no_layout_changes_what_is_given(shards, views, spec):
    augment = RandAugment(spec, size=16, mean=(0.5, 0.5, 0.5), seed=SEED) if spec else None
    crops = crops_of(open_index(str(shards / "train-*.tar")), views=views, window=2, augment=augment)
    plain = given(batches_of(crops, *LAYOUTS[0]))
    assert len(plain) == GLOBAL_BATCH * STEPS and len({crop for _, crop, _ in plain.values()}) == len(plain)
    assert len({sample for sample, *_ in plain.values()}) == min(96, len(plain) // views)
    if spec:
        crops_alone = given(batches_of(crops_of(crops.index, views=views, window=2), *LAYOUTS[0]))
        assert sum(plain[p][1] != crop for p, (_, crop, _) in crops_alone.items()) > len(plain) / 2
    for layout in LAYOUTS[1:]:
        steps = batches_of(crops, *layout)
        for step, batches in steps.items():
            positions = torch.cat([batch.positions for batch in batches]).sort().values
            assert positions.tolist() == list(range(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH))
        assert given(steps) == plain, layout


def test_views_of_an_image_differ_and_cost_one_read(tars, monkeypatch):
    crops, reads = crops_of(tars["good"], views=4), []
    read = crops.reader.read
    monkeypatch.setattr(crops.reader, "read", lambda sample: reads.append(sample) or read(sample))
    batch = crops.__getitems__(list(range(40)))
    assert len(reads) == 10 and sorted(batch.samples.tolist()) == sorted([*range(10)] * 4)
    assert len({crop.numpy().tobytes() for crop in batch.images}) == 40


@pytest.mark.parametrize("views", [1, 2])
def test_a_bad_image_is_replaced_by_a_fixed_one_and_named(tars, views):
    crops, whole = crops_of(tars["some"], views=views), crops_of(tars["good"], views=views)
    positions = torch.arange(GLOBAL_BATCH * STEPS)
    asked = crops.order.samples(positions)  # [P]
    plain = batches_of(crops, *LAYOUTS[0])
    samples = torch.cat([batch.samples for part in plain.values() for batch in part])  # [P]
    damaged = (asked == 3) | (asked == 7)
    assert damaged.sum() > 20 and torch.equal(samples[~damaged], asked[~damaged])
    assert not torch.isin(samples, torch.tensor([3, 7])).any() and len(samples[damaged].unique()) > 4
    labels = torch.cat([batch.labels for part in plain.values() for batch in part])  # [P]
    assert torch.equal(labels, samples % 3), "the label of what is seen, not of what was asked for"
    if views == 2:
        assert torch.equal(samples[::2], samples[1::2])
    for batch in (batch for part in plain.values() for batch in part):
        for i, position in enumerate(batch.positions.tolist()):
            if not damaged[position]:
                expected = whole.__getitems__([position]).images[0]
            else:  # a replacement is cropped by the draws of the position that it stands in for
                image = decode_rgb(crops.reader.read(int(batch.samples[i])))
                draws = uniform(SEED, torch.tensor([position]), Stream.CROP, n=CROP_DRAWS)[0].tolist()
                box = random_box(*image.shape[1:], draws, scale=crops.scale, ratio=crops.ratio)
                expected = crop(image, box, size=16)
            assert torch.equal(batch.images[i], expected)
    named = sorted(line for part in plain.values() for batch in part for line in batch.bad)
    assert len(named) >= damaged.sum() // views
    for line in named:
        assert line.startswith((f"{crops.index.shards[0]}:003: ", f"{crops.index.shards[0]}:007: no JPEG, PNG"))
    for layout in LAYOUTS[1:4]:
        steps = batches_of(crops, *layout)
        assert given(steps) == given(plain)
        assert sorted(line for part in steps.values() for batch in part for line in batch.bad) == named
    other = crops_of(tars["some"], views=views, seed=SEED + 1)
    other.order = crops.order
    assert not torch.equal(other.__getitems__(positions.tolist()).samples, samples), "another seed replaces by others"


def test_what_stands_in_for_a_bad_image_is_of_the_same_subset(tars):
    """Otherwise labels outside a label subset would be trained on."""
    crops = crops_of(tars["some"], subset=torch.tensor([3, 5, 7, 8]))
    samples = torch.cat([batch.samples for part in batches_of(crops, *LAYOUTS[0]).values() for batch in part])
    assert sorted(samples.unique().tolist()) == [5, 8]


@pytest.mark.parametrize("workers", [1, 2])
def test_no_batch_is_overwritten_while_it_is_taken_over(shards, workers, monkeypatch):
    """The workers make what they may while a batch waits in its slot; that slot must not be among what they fill."""
    crops, take = crops_of(open_index(str(shards / "train-*.tar"))), Batch.to
    monkeypatch.setattr(Batch, "to", lambda batch, device: time.sleep(0.1) or take(batch, device))
    steps = batches_of(crops, 1, workers, 6)
    assert sum(map(len, steps.values())) > 2 * (PREFETCHED * workers + 1)
    monkeypatch.undo()
    assert given(steps) == given(batches_of(crops, *LAYOUTS[0]))


def test_large_batches_are_not_prepared_far_ahead():
    photograph = 3 * 224**2
    ahead = [batches_ahead(8, batch * photograph) for batch in (64, 256, 512, 1024, 4096)]
    assert ahead == [4, 4, 3, 1, 1]
    assert batches_ahead(0, photograph) == PREFETCHED


def shm_files() -> set[str]:
    """What this process has mapped of /dev/shm."""
    return {line.split()[5] for line in Path("/proc/self/maps").read_text().splitlines() if "/dev/shm/" in line}


def test_images_need_no_room_in_shared_files(shards):
    """/dev/shm is 64 MB in many containers. A file that torch makes there has no name afterwards, but stays mapped."""
    before = shm_files()
    for batch in training_batches(crops_of(open_index(str(shards / "train-*.tar"))), 0, 6, workers=1, **one_rank(24)):
        assert batch.images.is_contiguous() and not batch.images.is_shared()
        assert shm_files() <= before


def test_samples_without_label_have_minus_one(tars):
    index = replace(tars["good"], labels=tars["good"].labels.copy())
    index.labels[4] = -1
    batch = crops_of(index).__getitems__(list(range(10)))
    assert torch.equal(batch.labels, torch.where(batch.samples == 4, -1, batch.samples % 3))


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_bad_images_is_a_data_error_also_from_a_worker(tars, workers):
    error, *_ = failure(training_batches(crops_of(tars["none"]), 0, 1, workers=workers, **one_rank(24)))
    assert "16 samples in a row" in error.cause and "none.tar:00" in error.cause and "--verify" in error.remedy


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_goes_is_a_data_error_also_from_a_worker(tars, workers):
    index = replace(tars["good"], shards=("gone.tar",))
    error, *_ = failure(training_batches(crops_of(index), 0, 1, workers=workers, **one_rank(24)))
    assert "gone.tar" in error.cause and error.exit_code == 3
