"""Reconstruction sheets: the columns, their sizes, and pixels that are the image's own where a patch is visible."""

import numpy as np
import pytest
import torch
from PIL import Image

from maedistill.methods.mae import MAE, PixelSpec
from maedistill.models.decoder import TokenDecoder
from maedistill.models.encoder import MaskedEncoder, build_vit
from maedistill.models.initialize import initialize
from maedistill.models.masking import random_split
from maedistill.pretraining.pictures import paste, reconstruction_sheet, show_only, tile

GAP, HEADER = 4, 18


def method(side: int) -> MAE:
    vit = build_vit("vit_tiny_patch16_224", image_size=side, width=32, depth=1, num_heads=2, patch_size=8)
    decoder = TokenDecoder(32, width=16, depth=1, num_heads=2, grid=side // 8, patch_size=8, num_prefix=1)
    built = MAE(MaskedEncoder(vit), decoder, pixels=PixelSpec((0.5, 0.4, 0.3), (0.2, 0.3, 0.25)))
    initialize(built, seed=0)
    return built.train()


def batch(side: int):
    """Images of whole levels, so that a sheet of bytes can hold them exactly, and a split."""
    images = torch.randint(0, 256, (3, 3, side, side), generator=torch.Generator().manual_seed(0)) / 255
    count = (side // 8) ** 2
    split = random_split(torch.arange(3), seed=0, num_patches=count, num_student=count // 4, num_teacher=count // 2)
    return images, split


def visible(ids: torch.Tensor, side: int) -> torch.Tensor:
    """Which pixels lie in the patches `ids`: bool [B, s, s]."""
    grid = side // 8
    seen = torch.zeros(len(ids), grid, grid, dtype=torch.bool)
    for row, patches in zip(seen, ids.tolist(), strict=True):
        for patch in patches:
            row[divmod(patch, grid)] = True
    return seen.repeat_interleave(8, 1).repeat_interleave(8, 2)


def column(sheet: Image.Image, x: int, side: int) -> torch.Tensor:
    """The images of a column, shrunk to their own size again: uint8 [B, 3, s, s]."""
    scale = max(1, -(-96 // side))
    step, pixels = side * scale + GAP, torch.from_numpy(np.array(sheet))
    left = GAP + x * step
    rows = [pixels[HEADER + y * step :][: side * scale, left : left + side * scale] for y in range(3)]
    large = torch.stack(rows)
    small = large[:, ::scale, ::scale]
    assert torch.equal(small.repeat_interleave(scale, 1).repeat_interleave(scale, 2), large), "enlarged unsmoothed"
    return small.permute(0, 3, 1, 2)


@pytest.mark.parametrize(("side", "teacher"), [(32, True), (32, False), (128, True)])
def test_a_sheet_shows_what_each_sees_and_what_is_predicted(side, teacher):
    module, (images, split) = method(side), batch(side)
    sheet = reconstruction_sheet(module, images, split, teacher=teacher)
    shown = side * max(1, -(-96 // side))
    assert sheet.size == ((3 + teacher) * (shown + GAP) + GAP, HEADER + 3 * (shown + GAP)) and module.training
    levels = (images * 255).round().byte()
    assert torch.equal(column(sheet, 0, side), levels)
    for x, ids in [(1, split.student), (2, split.teacher)][: 1 + teacher]:
        seen = visible(ids, side)[:, None].expand_as(levels)
        found = column(sheet, x, side)
        assert torch.equal(found[seen], levels[seen]) and found[~seen].unique().tolist() == [128]
    seen = visible(split.student, side)[:, None].expand_as(levels)
    predicted = column(sheet, 2 + teacher, side)
    assert torch.equal(predicted[seen], levels[seen])
    drawn = (module.eval().draw(images, split) * 255).round().byte()
    assert torch.equal(predicted[~seen], drawn[~seen]) and (drawn[~seen] != levels[~seen]).any()


def test_columns_are_labelled_in_their_own_ink():
    images, _ = batch(32)
    plain, labelled = tile({"": images, " ": images}), tile({"image": images, "student sees": images})
    num_heads = [np.array(sheet.crop((0, 0, sheet.width, HEADER))) for sheet in (plain, labelled)]
    assert num_heads[0].min() == 255 and all((num_heads[1][:, x : x + 96] < 128).any() for x in (GAP, 100 + GAP))
    assert np.array_equal(np.array(plain)[HEADER:], np.array(labelled)[HEADER:])


def test_values_out_of_range_are_clipped_not_wrapped():
    sheet = tile({"image": torch.tensor([-1.0, 2.0, 0.5]).view(1, 3, 1, 1).expand(3, 3, 32, 32)})
    assert column(sheet, 0, 32)[0, :, 0, 0].tolist() == [0, 255, 128]


def test_show_only_and_paste_leave_their_inputs_alone():
    images, split = batch(32)
    kept, other = images.clone(), torch.zeros_like(images)
    show_only(images, split.student, 8)
    paste(images, other, split.student, 8)
    assert torch.equal(images, kept) and not other.any()
