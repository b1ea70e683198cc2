"""Reconstruction sheets: the columns, their sizes, and pixels that are the image's own where a patch is visible."""

import numpy as np
import pytest
import torch
from PIL import Image

from maedistill.methods.mae import MAE, PixelSpec
from maedistill.models.decoder import TokenDecoder
from maedistill.models.encoder import MaskedEncoder
from maedistill.models.initialize import initialize
from maedistill.models.masking import PatchSplit, random_split
from maedistill.models.vits import build_vit
from maedistill.pretraining.pictures import paste, reconstruction_sheet, show_only
from maedistill.report.sheet import tile

GAP, GROUP_GAP, HEADER = 4, 24, 52  # pixels, of report/sheet.py


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


def column(sheet: Image.Image, x: int, side: int, *, gap: int = 0) -> torch.Tensor:
    """The images of a column, shrunk to their own size again: uint8 [B, 3, s, s]. gap: to the left of the column."""
    scale = max(1, -(-192 // side))
    step, pixels = side * scale + GAP, torch.from_numpy(np.array(sheet))
    left = GAP + x * step + gap
    rows = [pixels[HEADER + y * step :][: side * scale, left : left + side * scale] for y in range(3)]
    large = torch.stack(rows)
    small = large[:, ::scale, ::scale]
    assert torch.equal(small.repeat_interleave(scale, 1).repeat_interleave(scale, 2), large), "enlarged unsmoothed"
    return small.permute(0, 3, 1, 2)


@pytest.mark.parametrize(("side", "teacher"), [(32, True), (32, False), (128, True)])
def test_a_sheet_shows_what_each_sees_and_what_is_predicted(side, teacher):
    module, (images, split) = method(side), batch(side)
    sheet = reconstruction_sheet(module, images, split, teacher=teacher, title="run, step 7")
    shown = side * max(1, -(-192 // side))
    assert sheet.size == ((4 + teacher) * (shown + GAP) + GAP + GROUP_GAP, HEADER + 3 * (shown + GAP))
    assert module.training
    levels = (images * 255).round().byte()
    for x, ids in [(0, split.student), (1, split.teacher)][: 1 + teacher]:
        seen = visible(ids, side)[:, None].expand_as(levels)
        found = column(sheet, x, side)
        assert torch.equal(found[seen], levels[seen]) and found[~seen].unique().tolist() == [128]
    predicted, true, error = (column(sheet, 1 + teacher + x, side, gap=GROUP_GAP) for x in range(3))
    assert torch.equal(true, levels)
    seen = visible(split.student, side)[:, None].expand_as(levels)
    assert torch.equal(predicted[seen], levels[seen])
    drawn = (module.eval().draw(images, split) * 255).round().byte()
    assert torch.equal(predicted[~seen], drawn[~seen]) and (drawn[~seen] != levels[~seen]).any()
    distance = 2 * (predicted.float() - levels.float()).abs().mean(1, keepdim=True).clamp(max=127.5)
    assert not error[seen].any() and (error.float() - distance).abs().max() <= 2, "twice the distance, in grey"


def test_a_teacher_that_sees_the_same_patches_has_no_column():
    module, (images, split) = method(32), batch(32)
    same = PatchSplit(split.order, split.num_student, split.num_student)
    sheets = [reconstruction_sheet(module, images, one, teacher=True, title="") for one in (same, split)]
    assert sheets[1].width - sheets[0].width == 192 + GAP


def test_labels_and_title_are_drawn_and_change_no_picture():
    images, _ = batch(32)
    plain, labelled = tile([{"": images}, {" ": images}]), tile([{"image": images}, {"true": images}], title="run")
    heads = [np.array(sheet.crop((0, 0, sheet.width, HEADER))) for sheet in (plain, labelled)]
    assert heads[0].min() == 255 and (heads[1][: HEADER // 2] < 128).any()
    assert all((heads[1][HEADER // 2 :, x : x + 192] < 128).any() for x in (GAP, 196 + GAP + GROUP_GAP))
    assert np.array_equal(np.array(plain)[HEADER:], np.array(labelled)[HEADER:])
    assert (np.array(plain)[:, 196 + GAP : 196 + GROUP_GAP] == 255).all(), "the groups are apart"


def test_values_out_of_range_are_clipped_not_wrapped():
    sheet = tile([{"image": torch.tensor([-1.0, 2.0, 0.5]).view(1, 3, 1, 1).expand(3, 3, 32, 32)}])
    assert column(sheet, 0, 32)[0, :, 0, 0].tolist() == [0, 255, 128]


def test_show_only_and_paste_leave_their_inputs_alone():
    images, split = batch(32)
    kept, other = images.clone(), torch.zeros_like(images)
    show_only(images, split.student, 8)
    paste(images, other, split.student, 8)
    assert torch.equal(images, kept) and not other.any()
