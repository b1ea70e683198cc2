"""Decoded images that are kept: the same batches as without, a bound that holds, one copy for a machine's ranks."""

import os
import platform
import signal
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from maedistill.config.plan import BatchPlan
from maedistill.data.images.augment import RandAugment
from maedistill.data.images.decode import BadImage, decode_rgb
from maedistill.data.images.shared_images import KeptImages, table_bytes
from maedistill.data.loading import decoded_cache
from maedistill.data.loading.dataset import open_dataset
from maedistill.data.loading.decoded_cache import keep_decoded, room_for
from maedistill.data.loading.loader import BatchSampler, host_batches
from maedistill.data.shards.open_index import open_index
from maedistill.errors import ConfigError
from tests.data.crops import crops_of
from tests.data.pictures import encode
from tests.data.tar_files import write_tar
from tests.support.forked import exit_code, fork

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # torch's own threads
COUNT, BAD, BATCH, STEPS = 12, 2, 6, 8  # four epochs
TURNED = 0x0112  # EXIF tag of the orientation


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """Pictures of all kinds and sizes, half of them turned by EXIF, two of them damaged."""
    draws, members = np.random.default_rng(0), {}
    for i in range(COUNT):
        pixels = draws.integers(0, 256, (20 + i, 40 - 2 * i, 3), dtype=np.uint8)
        exif = Image.Exif()
        exif[TURNED] = 6 if i % 2 else 1
        kind, mode = ("JPEG", "RGB") if i % 3 else ("PNG", "L")
        members[f"{i:03d}.{kind.lower()}"] = encode(Image.fromarray(pixels).convert(mode), kind, exif=exif)
    members |= {"001.jpeg": b"no image", "005.jpeg": members["005.jpeg"][:200]}
    return open_index(str(write_tar(tmp_path_factory.mktemp("tars") / "a.tar", members)), apply_exif=True)


def batches_of(crops, *, ranks=1, workers=0, first_step=0):
    """Everything that all ranks get, as bytes and numbers; rank by rank, as ranks that run beside each other may."""
    plan, got = BatchPlan(BATCH // ranks, 1), []
    for rank in range(ranks):
        sampler = BatchSampler(first_step, STEPS, plan, rank, ranks)
        for batch in host_batches(crops, sampler, workers=workers, pin_memory=False):
            got.append((batch.images.numpy().tobytes(), batch.labels.tolist(), batch.samples.tolist(), batch.bad))
    return got


def pixels_of(index):
    """The decoded images by id, without the damaged ones."""
    reader, images = crops_of(index).reader, {}
    for i in range(len(index)):
        try:
            images[i] = reader.decoded(i, lambda data: decode_rgb(data, apply_exif=True))
        except BadImage:
            continue
    assert len(images) == COUNT - BAD
    return images


def total_bytes(index):
    return table_bytes(COUNT) + sum(image.numel() for image in pixels_of(index).values())


@pytest.mark.parametrize(("room", "ranks", "workers"), [(1.0, 1, 0), (1.0, 3, 2), (0.5, 1, 2), (0.5, 3, 0)])
def test_the_batches_are_those_without_also_where_not_all_fit(index, room, ranks, workers):
    plain, capacity = batches_of(crops_of(index), ranks=ranks), int(room * total_bytes(index))
    assert any(bad for *_, bad in plain)
    kept = KeptImages.create(COUNT, capacity)
    assert batches_of(crops_of(index, kept=kept), ranks=ranks, workers=workers) == plain
    here = [i for i in range(COUNT) if kept.get(i) is not None]
    assert here == list(pixels_of(index)) if room == 1 else 2 < len(here) < COUNT - BAD
    assert kept.used == capacity if room == 1 else kept.used <= capacity
    # a run that was killed starts with none, and amid an epoch
    fresh = crops_of(index, kept=KeptImages.create(COUNT, capacity))
    later = batches_of(fresh, ranks=ranks, workers=workers, first_step=3)
    assert later == [batch for r in range(ranks) for batch in plain[r * STEPS + 3 : (r + 1) * STEPS]]


def test_each_image_is_decoded_once_and_its_crops_are_augmented_anew(index, monkeypatch):
    augment = RandAugment("rand-m9-mstd0.5-inc1", size=16, mean=(0.5, 0.5, 0.5), seed=3)
    crops = crops_of(index, kept=KeptImages.create(COUNT, 10**6), views=2, augment=augment)
    reads, reported, read = [], [], crops.reader.read
    monkeypatch.setattr(crops.reader, "read", lambda sample: reads.append(sample) or read(sample))
    crops.reader.on_read = lambda sample, fetching: reported.append(sample)  # the watchdog sees kept ones, too
    got = batches_of(crops)
    assert got == batches_of(crops_of(index, views=2, augment=augment))
    good = [sample for sample in reads if sample not in (1, 5)]
    assert len(good) == len(set(good)) and len(reads) > len(good) + BAD, "damaged ones are tried at each visit"
    assert len(reported) > len(reads)


def test_a_data_set_of_planar_tensors_is_cropped_as_without(monkeypatch):
    pictures = torch.randint(0, 256, (COUNT, 3, 21, 33), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    dataset = SimpleNamespace(items=[*pictures[:6], *pictures[6:, :1]])

    class Pictures:
        def __len__(self):
            return COUNT

        def __getitem__(self, i):
            return dataset.items[i]

    index = open_dataset(Pictures(), "Pictures")
    kept = crops_of(index)
    assert "12 images" in keep_decoded(kept, "auto")
    assert batches_of(kept) == batches_of(crops_of(index))
    assert all(torch.equal(kept.reader.kept.get(i), pictures[i]) for i in range(6))


def test_memory_is_taken_as_images_come_and_stays_within_the_bound():
    """PSS: what this process has of the file, which it shares with nobody here."""

    def pss() -> int:
        maps = Path("/proc/self/smaps").read_text().partition(kept.address[1])[2]
        return 1024 * int(maps.partition("Pss:")[2].split()[0])

    capacity = 40 * 2**20
    kept, image = KeptImages.create(1000, capacity), torch.full((3, 200, 500), 7, dtype=torch.uint8)
    assert pss() < 2**16
    for i in range(100):
        kept.put(i, image)
    assert 30e6 <= pss() <= 31e6
    for i in range(100, 1000):
        kept.put(i, image)
    assert capacity - image.numel() < kept.used <= capacity and pss() <= capacity
    assert os.stat(kept.address[0]).st_blocks * 512 <= capacity
    assert torch.equal(kept.get(138), image) and kept.get(139) is None


def test_where_the_system_refuses_a_page_the_rest_is_decoded_each_time(index, monkeypatch):
    crops, calls = crops_of(index, kept=KeptImages.create(COUNT, 10**6)), []

    def refuse(*_):
        calls.append(1)
        if len(calls) > 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    assert batches_of(crops) == batches_of(crops_of(index))
    assert len(calls) == 4 and sum(crops.reader.kept.get(i) is not None for i in range(COUNT)) == 3


def test_processes_that_come_with_the_same_images_keep_one_of_each(index):
    images, kept = pixels_of(index), KeptImages.create(COUNT, 10**6)

    def put(number):
        for i in sorted(images, key=lambda i: (i * (2 * number + 1)) % 11):
            kept.put(i, images[i])
            assert torch.equal(kept.get(i), images[i])

    processes = [fork(partial(put, number)) for number in range(4)]
    assert [exit_code(process) for process in processes] == [0] * 4
    assert all(torch.equal(kept.get(i), image) for i, image in images.items())
    assert kept.used <= total_bytes(index) + 3 * max(image.numel() for image in images.values())


def test_two_images_never_take_the_same_place(index):
    images, kept, (read, write) = pixels_of(index), KeptImages.create(COUNT, 10**6), os.pipe()
    allocate = os.posix_fallocate

    def slowly(*place):
        os.write(write, b"!")
        time.sleep(0.3)
        allocate(*place)

    def put():
        os.posix_fallocate = slowly
        kept.put(0, images[0])

    child = fork(put)
    os.close(write)  # so that the read ends if the child does
    os.read(read, 1)  # the child has chosen its place
    kept.put(2, images[2])
    assert exit_code(child) == 0
    assert torch.equal(kept.get(0), images[0]) and torch.equal(kept.get(2), images[2])
    os.close(read)


def test_a_process_killed_amid_an_image_blocks_nobody_and_leaves_no_half(index):
    image, kept = pixels_of(index)[0], KeptImages.create(COUNT, 10**6)

    def die():
        kept._view = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        kept.put(0, image)

    assert exit_code(fork(die)) == -signal.SIGKILL
    assert kept.get(0) is None
    kept.put(0, image)
    assert torch.equal(kept.get(0), image)


def test_ranks_of_a_machine_share_one_copy_and_those_of_others_make_their_own(index, monkeypatch):
    first, second, far = crops_of(index), crops_of(index), crops_of(index)
    said = keep_decoded(first, "auto")
    news = (platform.node(), first.reader.kept.address, said)
    monkeypatch.setattr(decoded_cache.distributed, "local_rank", lambda: 1)
    monkeypatch.setattr(decoded_cache.distributed, "gather_objects", lambda mine: [news, mine])
    assert keep_decoded(second, "auto") == said
    monkeypatch.setattr(decoded_cache.distributed, "gather_objects", lambda mine: [("elsewhere", *news[1:]), mine])
    assert keep_decoded(far, "auto") == said and far.reader.kept is None
    image = pixels_of(index)[4]
    assert exit_code(fork(lambda: second.reader.kept.put(4, image))) == 0
    assert torch.equal(first.reader.kept.get(4), image)
    with pytest.raises(OSError, match="is not"):
        KeptImages.open((news[1][0], "/memfd:another (deleted)"), COUNT)


def test_what_one_machine_refuses_ends_all_ranks(index, monkeypatch):
    refusal = ConfigError("no room", "more memory")
    monkeypatch.setattr(decoded_cache.distributed, "gather_objects", lambda mine: [mine, ("elsewhere", refusal, None)])
    with pytest.raises(ConfigError, match="no room"):
        keep_decoded(crops_of(index), True)


def test_the_room_decides(index, monkeypatch):
    images = pixels_of(index).values()
    needed = table_bytes(COUNT) + COUNT * sum(image.numel() for image in images) // len(images)
    crops = crops_of(index)
    for setting, share in (("auto", 4), (True, 2)):
        monkeypatch.setattr(decoded_cache, "free_memory", lambda share=share: share * needed)
        assert room_for(crops, setting).needed == pytest.approx(needed, rel=0.1)  # headers of damaged ones can be read
        exact = share * room_for(crops, setting).needed
        monkeypatch.setattr(decoded_cache, "free_memory", lambda exact=exact: exact)
        assert room_for(crops, setting).is_enough and "kept in memory: 12 images" in room_for(crops, setting).line()
        monkeypatch.setattr(decoded_cache, "free_memory", lambda exact=exact, share=share: exact - share)
        assert not room_for(crops, setting).is_enough
        monkeypatch.setattr(decoded_cache, "free_memory", lambda exact=exact: 2 * exact)
        monkeypatch.setenv("MAEDISTILL_JOBS", "2")
        assert room_for(crops, setting).is_enough and "shared by 2 runs" in room_for(crops, setting).line()
        monkeypatch.setenv("MAEDISTILL_JOBS", "3")
        assert not room_for(crops, setting).is_enough
        monkeypatch.delenv("MAEDISTILL_JOBS")
        monkeypatch.setattr(decoded_cache, "free_memory", lambda exact=exact, share=share: exact - share)
    with pytest.raises(ConfigError, match=r"data\.keep_decoded=true: 12 images"):
        keep_decoded(crops, True)
    assert crops.reader.kept is None
    monkeypatch.setattr(decoded_cache, "free_memory", lambda: 100)
    assert "each time: 12 images" in keep_decoded(crops, "auto") and crops.reader.kept is None
    assert keep_decoded(crops, False) is None and crops.reader.kept is None


def test_a_system_without_such_memory_decodes_each_time(index, monkeypatch):
    def refuse(name):
        raise OSError(38, "Function not implemented")

    crops = crops_of(index)
    monkeypatch.setattr(os, "memfd_create", refuse)
    assert "the system provides no shared memory" in keep_decoded(crops, "auto") and crops.reader.kept is None
    with pytest.raises(ConfigError, match=r"data\.keep_decoded=true: .*Function not implemented"):
        keep_decoded(crops, True)


def test_of_remote_shards_only_the_one_that_is_read_first_is_looked_at(shards):
    crops = crops_of(open_index(str(shards / "train-*.tar")))
    looked_at = decoded_cache._few_samples(crops)
    assert {crops.index.shard_of(i) for i in looked_at} == {0, 1, 2, 3} and len(looked_at) == 48
    crops.reader.is_remote = True
    first = crops.index.shard_of(int(crops.order.samples(torch.tensor([0]))))
    assert {crops.index.shard_of(i) for i in decoded_cache._few_samples(crops)} == {first}
