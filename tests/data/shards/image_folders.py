"""Folders of small pictures."""

import os
from pathlib import Path

import numpy as np
from PIL import Image

from tests.data.pictures import encode

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (2, 2, 3), dtype=np.uint8)).resize((24, 20))
PNG = encode(PICTURE, "PNG")


def fill(folder: Path, files) -> Path:
    """Write files: {path: bytes}, or a list of paths of one small picture. A path may be bytes that are not UTF-8."""
    for name in files:
        path = os.path.join(os.fsencode(folder), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(files[name] if isinstance(files, dict) else PNG)
    return folder
