"""Odd and bad images of every kind in a shard: which are read, and which are replaced, named and counted."""

import numpy as np
import pytest
import torch
from PIL import Image

from maedistill.data.loading.loader import training_batches
from maedistill.data.shards.open_index import open_index
from tests.data.crops import crops_of, one_rank
from tests.data.pictures import bomb, encode
from tests.data.tar_files import write_tar

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # torch's own threads


def samples():
    """{key: (suffix, bytes, why it is bad or None)}."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    image, frames = Image.fromarray(pixels), [Image.new("RGB", (20, 24), "blue")]
    deep = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    jpeg, png, webp = (encode(image, kind) for kind in ("JPEG", "PNG", "WEBP"))
    return {
        "plain": ("jpg", jpeg, None),
        "grayscale": ("jpg", encode(image.convert("L"), "JPEG"), None),
        "cmyk": ("jpg", encode(image.convert("CMYK"), "JPEG"), None),
        "progressive": ("jpg", encode(image, "JPEG", progressive=True), None),
        "palette": ("png", encode(image.convert("P"), "PNG"), None),
        "one-bit": ("png", encode(image.convert("1"), "PNG"), None),
        "alpha": ("png", encode(image.convert("RGBA"), "PNG"), None),
        "16-bit": ("png", encode(deep, "PNG"), None),
        "animated-webp": ("webp", encode(image, "WEBP", save_all=True, append_images=frames), None),
        "animated-png": ("png", encode(image, "PNG", save_all=True, append_images=frames), None),
        "png-called-jpg": ("jpg", png, None),
        "jpg-called-webp": ("webp", jpeg, None),
        "zero-byte": ("jpg", b"", "no JPEG, PNG, WEBP file"),
        "text-called-jpg": ("jpg", b"<html>404</html>", "no JPEG, PNG, WEBP file"),
        "gif-called-jpg": ("jpg", encode(image, "GIF"), "no JPEG, PNG, WEBP file"),
        "tiff-called-png": ("png", encode(image, "TIFF"), "no JPEG, PNG, WEBP file"),
        "truncated-jpg": ("jpg", jpeg[: len(jpeg) // 2], "truncated"),
        "truncated-png": ("png", png[: len(png) // 2], ""),
        "truncated-webp": ("webp", webp[: len(webp) // 2], ""),
        "header-only": ("jpg", jpeg[:20], ""),
        "corrupt-png": ("png", png[:50] + b"\xff" * 100 + png[150:], ""),
        "bomb": ("png", bomb(), "pixels"),
    }


@pytest.fixture(scope="module")
def oddities(tmp_path_factory):
    members = {f"{key}.{suffix}": data for key, (suffix, data, _) in samples().items()}
    return open_index(str(write_tar(tmp_path_factory.mktemp("odd") / "odd.tar", members)))


@pytest.mark.parametrize("key", samples())
def test_each_kind_of_image_is_read_or_replaced_and_named(oddities, key):
    bad = samples()[key][2]
    crops = crops_of(oddities)
    sample = next(i for i in range(len(oddities)) if oddities.key(i) == key)
    position = crops.order.samples(torch.arange(len(oddities))).tolist().index(sample)
    batch = crops.__getitems__([position])
    assert batch.images.shape == (1, 3, 16, 16)
    if bad is None:
        assert not batch.bad and batch.samples.tolist() == [sample]
    else:
        assert batch.bad[0].startswith(f"{oddities.shards[0]}:{key}: ") and bad in batch.bad[0]
        assert samples()[oddities.key(int(batch.samples))][2] is None
        again = crops.__getitems__([position])
        assert torch.equal(again.images, batch.images) and again.bad == batch.bad


def test_every_bad_image_is_listed_in_every_epoch_and_no_other(oddities):
    count = len(oddities)
    batches = list(training_batches(crops_of(oddities), 0, count, workers=2, **one_rank(12)))  # twelve epochs
    positions = torch.cat([batch.positions for batch in batches])
    assert positions.tolist() == list(range(12 * count))
    named = [line.split(": ")[0].rpartition(":")[2] for batch in batches for line in batch.bad]
    wrong = {key for key, (_, _, bad) in samples().items() if bad is not None}
    assert set(named) == wrong and all(named.count(key) >= 12 for key in wrong)  # replacements may be bad, too
