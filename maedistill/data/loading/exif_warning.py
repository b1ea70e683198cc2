"""Warn that photographs are not upright: some state an EXIF orientation, which is not applied.

ShardIndex -> warn_of_turned -> a warning, if at least a few in a hundred are turned
"""

from maedistill.data.images.decode import BadImage, open_image
from maedistill.data.images.orientation import AS_STORED, orientation
from maedistill.data.shards.index import ShardIndex
from maedistill.data.shards.reader import ShardReader
from maedistill.escaping import warn

LOOKED_AT, SHARE = 100, 0.02  # images, spread over the set; the share of them from which on a line is worth it


def warn_of_turned(index: ShardIndex) -> None:
    """Look at the headers of some images of local shards, and warn if `data.exif` may be needed."""
    reader = ShardReader(index)
    if index.apply_exif or reader.is_remote:
        return
    samples = sorted({i * len(index) // LOOKED_AT for i in range(LOOKED_AT)})
    turned = sum(_is_turned(reader.read(sample)) for sample in samples)
    if turned >= SHARE * len(samples):
        warn(
            f"{turned} of {len(samples)} images looked at state an EXIF orientation, and their pixels are read as they "
            "are stored, lying on their side; data.exif=apply turns them upright"
        )


def _is_turned(data: bytes) -> bool:
    try:
        with open_image(data) as image:
            return orientation(image) != AS_STORED
    except BadImage:  # training replaces and lists it
        return False
