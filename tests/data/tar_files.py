"""Tars and splits of a few bytes a sample, written by Python's own tarfile."""

import io
import tarfile
from pathlib import Path

SAMPLES = {"000.jpg": b"a" * 700, "000.cls": b"3", "001.cls": b"12", "001.png": b"b" * 512, "002.webp": b"c"}


def suffixes(folder) -> list[str]:
    return sorted(path.suffix for path in folder.iterdir())


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


def write_split(folder: Path, shards=3, samples=4):
    for shard in range(shards):
        members = {}
        for i in range(samples):
            members[f"{shard}_{i}.jpg"] = f"image {shard} {i}".encode() * (i + 1)
            members[f"{shard}_{i}.cls"] = str(shard).encode()
        write_tar(folder / f"train-{shard:06d}.tar", members)
    return str(folder / "train-*.tar")
