"""Pictures in any format; tars and splits of a few bytes a sample, written by Python's own tarfile."""

import io
import struct
import tarfile
import zlib
from pathlib import Path

from PIL import Image

from maedistill.data.loading.loader import RandomCrops
from maedistill.data.loading.order import SampleOrder

SAMPLES = {"000.jpg": b"a" * 700, "000.cls": b"3", "001.cls": b"12", "001.png": b"b" * 512, "002.webp": b"c"}


def suffixes(folder) -> list[str]:
    return sorted(path.suffix for path in folder.iterdir())


def encode(image, kind, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def bomb(width=10_000, height=10_000) -> bytes:
    """A PNG of a few bytes that says it has that many pixels."""
    plain = encode(Image.new("RGB", (1, 1)), "PNG")
    header = struct.pack(">II", width, height) + plain[24:29]
    return plain[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + plain[33:]


def crops_of(index, augment=None) -> RandomCrops:
    order = SampleOrder(index.starts, seed=5)
    return RandomCrops(index, order, seed=5, size=16, scale=(0.2, 1.0), ratio=(1.0, 1.0), augment=augment)


def write_tar(path: Path, members, tar_format=tarfile.USTAR_FORMAT, **attributes):
    """A tar written by Python's own module; a member's value is its bytes or, as a text, its tar type."""
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            for key, value in attributes.items():
                setattr(info, key, value)
            if isinstance(data, str):
                info.type, data = data.encode(), b""
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_split(folder: Path, shards=3, samples=4, name="train"):
    for shard in range(shards):
        members = {}
        for i in range(samples):
            members[f"{shard}_{i}.jpg"] = f"image {shard} {i}".encode() * (i + 1)
            members[f"{shard}_{i}.cls"] = str(shard).encode()
        write_tar(folder / f"{name}-{shard:06d}.tar", members)
    return str(folder / f"{name}-*.tar")
