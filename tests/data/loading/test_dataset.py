"""A data set of a Python program: indexed and read like shards, its odd items and targets named."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from maedistill.data.images.decode import BadImage, decode_rgb
from maedistill.data.loading.dataset import open_dataset, open_reader
from maedistill.errors import DataError
from tests.data.pictures import encode


class Squares:
    """Twenty images of one colour each; item 7 is damaged."""

    classes = ("dark", "bright")

    def __init__(self, count=20, bad=(7,)):
        self.targets, self.bad = [i % 2 for i in range(count)], bad

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        if i in self.bad:
            raise OSError("truncated")
        return np.full((8, 10, 3), i, np.uint8), self.targets[i]


def test_a_data_set_is_indexed_and_read_like_shards():
    index = open_dataset(Squares(), "Squares")
    reader = open_reader(index)
    assert len(index) == 20 and index.labels.tolist() == [0, 1] * 10 and index.num_classes == 2
    assert index.sample_name(3) == "Squares[3]" and index.key(19) == "19"
    assert reader.decoded(5, None).shape == (3, 8, 10) and int(reader.decoded(5, None).max()) == 5
    with pytest.raises(BadImage, match="truncated"):
        reader.decoded(7, None)
    image, sample, bad = reader.read_first([7, 8], None)
    assert sample == 8 and int(image.max()) == 8 and bad == ["Squares[7]: OSError: truncated"]
    assert open_dataset(Squares(), "other").fingerprint() == index.fingerprint()
    assert open_dataset(Squares(bad=()), "Squares").fingerprint() == index.fingerprint()  # 7 is not among those probed
    assert open_dataset(Squares(19), "Squares").fingerprint() != index.fingerprint()


@pytest.mark.parametrize(
    "item", [1.0, np.zeros((8, 8, 3)), torch.zeros(3, 8, 8), torch.zeros(4, 8, 8, dtype=torch.uint8), "photo.jpg"]
)
def test_an_item_that_is_no_image_is_named(item):
    class Odd(Squares):
        def __getitem__(self, i):
            return item

    with pytest.raises(DataError, match=r"Odd\[0\]"):
        open_reader(open_dataset(Odd(), "Odd")).decoded(0, None)


@pytest.mark.parametrize(
    "targets", [["cat"] * 20, [1.5] * 20, [], [[1], [2, 3]], [0] * 19, [-2] * 20, [None] * 20, [[1]] * 20]
)
def test_targets_that_are_no_whole_numbers_are_named(targets):
    class Odd(Squares):
        def __len__(self):
            return 20

    odd = Odd()
    odd.targets = targets
    with pytest.raises(DataError):
        open_dataset(odd, "Odd")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_a_picture_has_the_pixels_that_its_file_has_in_shards(mode):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 10, 4), dtype=np.uint8), "RGBA")
    data = encode(picture.quantize(16) if mode == "P" else picture.convert(mode), "PNG")

    class Pictures(Squares):
        def __getitem__(self, i):
            return Image.open(io.BytesIO(data if i else data[:60]))

    reader = open_reader(open_dataset(Pictures(), "Pictures"))
    assert torch.equal(reader.decoded(1, None), decode_rgb(data))
    with pytest.raises(BadImage):
        reader.decoded(0, None)
