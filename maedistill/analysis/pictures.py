"""The images that are analysed, and where their foreground is.

index -> choose_samples -> read_pictures -> Pictures: pixels, names, ids
center, none, or a folder of masks -> read_foreground -> bool [I, n]

I images   n = g*g cells   s image side
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from maedistill.data.images.decode import BadImage, damage_as_bad_image, decode_rgb, open_image
from maedistill.data.loading.evaluation import EvaluationImages, undecodable
from maedistill.data.shards.index import ShardIndex
from maedistill.errors import ConfigError, DataError
from maedistill.evaluation.context import EvalContext
from maedistill.evaluation.full_pass import report_bad
from maedistill.randomness import Stream, key, permute
from maedistill.weights.network import Network


@dataclass(frozen=True, eq=False)
class Pictures:
    """Images that could be decoded. ids: int64 [I], ascending, of the index. pixels: uint8 [I, 3, s, s]."""

    index: ShardIndex
    ids: Tensor
    pixels: Tensor

    @property
    def names(self) -> list[str]:
        """Return the key of each image in its shard."""
        return [self.index.key(sample) for sample in self.ids.tolist()]


def read_pictures(index: ShardIndex, network: Network, context: EvalContext, *, count: int, seed: int) -> Pictures:
    """Choose `count` samples at random, as seed and index determine, and decode them as `network` sees them."""
    chosen = permute(torch.arange(min(count, len(index))), len(index), key(seed, Stream.SUBSET)).sort().values
    images = EvaluationImages(index, chosen, network.transform())
    pixels, _, ids = images.__getitems__(list(range(len(chosen))))
    is_bad = ids < 0
    if is_bad.any():
        report_bad(images, undecodable(ids[is_bad]), context)
    return Pictures(index, ids[~is_bad], pixels[~is_bad])


def check_foreground(where: str, grid: int | None) -> None:
    """Raise ConfigError if the folder of masks is missing, or if a grid whose cells are known has no centre."""
    if where == "center" and grid is not None and grid < 3:
        raise ConfigError(f"--foreground: {grid} x {grid} cells have no centre", "give masks, or none")
    if where not in ("center", "none") and not Path(where).is_dir():
        raise ConfigError(f"--foreground: {where} is not a folder", "name a folder of masks, or center, or none")


def read_foreground(where: str, pictures: Pictures, network: Network, *, grid: int) -> np.ndarray | None:
    """Return which cells are foreground, bool [I, n]; None if the user wants no foreground.

    where: `center`, `none`, or a folder with a mask KEY.png of each image, of its size, whose foreground is not 0. It
    is cropped as the image is; a cell is foreground if at least half of it is. Raises ConfigError or DataError.
    """
    check_foreground(where, grid)
    if where == "none":
        return None
    if where == "center":
        border = max(1, round(grid / 8))  # the paper's: 2 of 16 cells
        cells = torch.zeros(grid, grid, dtype=torch.bool)
        cells[border:-border, border:-border] = True
        return cells.flatten().expand(len(pictures.ids), -1).numpy()
    black = (0.0, 0.0, 0.0)
    transform = replace(network, interpolation="nearest", mean=black, border=None).transform()
    decode = partial(decode_rgb, apply_exif=pictures.index.apply_exif)
    reader = EvaluationImages(pictures.index, pictures.ids, network.transform()).reader
    rows = []
    for sample, name in zip(pictures.ids.tolist(), pictures.names, strict=True):
        height, width = reader.decoded(sample, decode).shape[1:]
        mask = transform(_read_mask(Path(where), name, (height, width)))[:1].float() / 255  # [1, s, s]
        rows.append(F.avg_pool2d(mask, network.size // grid).flatten() >= 0.5)
    return torch.stack(rows).numpy()


def _read_mask(folder: Path, name: str, size: tuple[int, int]) -> Image.Image:
    """Return a mask as an RGB image of 0 and 255. size: height and width that it must have."""
    file = folder / f"{name}.png"
    if name.startswith("/") or ".." in PurePosixPath(name).parts or not file.is_file():
        raise DataError(f"{file} is missing", "give each image a mask KEY.png, of its key in the shards")
    try:
        with damage_as_bad_image(), open_image(file.read_bytes(), formats=("PNG",)) as mask:
            values = np.atleast_3d(np.array(mask))  # [h, w, c]
    except BadImage as error:
        raise DataError(f"{file} cannot be decoded ({error})", "write it again, as a PNG of numbers") from error
    if values.shape[:2] != size:
        sizes = [f"{width} x {height}" for height, width in (values.shape[:2], size)]
        remedy = "draw it in the image's own size, rotated as the image is shown (--exif)"
        raise DataError(f"{file} has {sizes[0]} pixels and its image {sizes[1]}", remedy)
    is_foreground = (values[..., : 1 if values.shape[-1] == 2 else 3] != 0).any(-1)  # without alpha
    return Image.fromarray(is_foreground.astype(np.uint8) * 255).convert("RGB")
