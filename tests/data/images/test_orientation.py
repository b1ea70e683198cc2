"""EXIF orientation: where it is asked for, it is exact in every reader; else nothing changes."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from maedistill.config.loader import load_config
from maedistill.config.pretrain import PretrainConfig
from maedistill.data.images.decode import decode_rgb
from maedistill.data.loading.evaluation import EvaluationImages, evaluation_transform
from maedistill.data.loading.loader import RandomCrops
from maedistill.data.loading.order import SampleOrder
from maedistill.data.shards.open_index import open_index
from maedistill.runs.objects import NOTHING, open_samples
from tests.data.pictures import encode
from tests.data.tar_files import write_tar

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (2, 3, 3), dtype=np.uint8)).resize((30, 20))


def turned(kind, tag, **options):
    exif = Image.Exif()
    exif[0x0112] = tag
    return encode(PICTURE, kind, exif=exif, **options)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("tag", [*range(1, 9), 0, 9])
def test_an_orientation_is_applied_as_pillow_does_and_ignored_by_default(kind, tag):
    data = turned(kind, tag)
    with Image.open(io.BytesIO(data)) as image:
        stored, upright = np.asarray(image.convert("RGB")), np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert np.array_equal(decode_rgb(data).permute(1, 2, 0).numpy(), stored)
    assert np.array_equal(decode_rgb(data, apply_exif=True).permute(1, 2, 0).numpy(), upright)


def test_damaged_exif_says_nothing():
    data = turned("JPEG", 6).replace(b"Exif\0\0II*\0", b"Exif\0\0II*\xff").replace(b"Exif\0\0MM\0*", b"Exif\0\0MM\xff*")
    assert torch.equal(decode_rgb(data, apply_exif=True), decode_rgb(data))


def test_training_and_evaluation_see_photographs_upright_if_asked(tmp_path):
    path = str(write_tar(tmp_path / "a.tar", {"0.png": turned("PNG", 6), "0.cls": b"0"}))
    views = {}
    for apply in (False, True):
        index = open_index(path, apply_exif=apply)
        crops = RandomCrops(index, SampleOrder(index.starts, seed=0), seed=0, size=20, scale=(1, 1), ratio=(1, 1))
        images = EvaluationImages(index, torch.arange(1), evaluation_transform(size=20, crop=1.0))
        views[apply] = [crops.__getitems__([0]).images[0], images.__getitems__([0])[0][0]]
    for stored, upright in zip(views[False], views[True], strict=True):
        difference = (torch.rot90(stored, -1, (1, 2)).float() - upright.float()).abs()
        # levels: the resize rounds, before the turn or after it
        assert difference.mean() < 4 and (stored.float() - upright.float()).abs().mean() > 20


@pytest.mark.parametrize("share", [1, 3])
def test_the_keys_of_a_run_reach_its_images_and_photographs_on_their_side_are_warned_of(tmp_path, capsys, share):
    """1 of 100 photographs is no reason to speak, 3 are."""
    members = {}
    for i in range(100):
        photograph = turned("PNG", 6 if i < share else 1)
        members |= {f"{i}.in.png": photograph, f"{i}.out.png": b"no image", f"{i}.fine.cls": b"1", f"{i}.cls": b"0"}
    path = str(write_tar(tmp_path / "a.tar", members))
    for exif in ("ignore", "apply"):
        capsys.readouterr()
        data = {"train": path, "image_key": "in.png", "label_key": "fine.cls", "exif": exif}
        config = load_config({"method": "mae", "data": data}, root=PretrainConfig, to_run=False).config
        index, _ = open_samples(config.data, NOTHING)
        assert set(index.labels) == {1} and index.sizes[0] == len(members["0.in.png"])
        assert index.apply_exif is (exif == "apply")
        err = capsys.readouterr().err
        assert ("warning: 3 of 100 " in err and "data.exif" in err) == (share == 3 and exif == "ignore")
