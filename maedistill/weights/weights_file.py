"""A weights file of others, read without executing anything and without believing its sizes.

a.safetensors, a.pth -> read_weights_file -> what it holds: usually a dict of tensors, perhaps with more around it
"""

import hashlib
import os
import re
import struct
import warnings
import zipfile
from argparse import Namespace
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.serialization import safe_globals

from maedistill.errors import DataError

# What reading a file that is cut, damaged or no weights at all raises, depending on where the damage is.
READ_ERRORS = (
    SafetensorError, UnpicklingError, zipfile.BadZipFile, OSError, RuntimeError, EOFError, ValueError, LookupError,
    TypeError, AttributeError, AssertionError, MemoryError, struct.error,
)  # fmt: skip
# How files begin that people have in place of weights, in small letters, and what they are.
_MISTAKEN = {b"<!doctype": "a web page", b"<html": "a web page", b"version https://git-lfs": "a pointer of Git LFS"}


def read_weights_file(path: str | Path, *, sha256: str | None = None, section: str = "teacher") -> object:
    """What a .safetensors or .pth file holds; pickles are read weights-only, so no code of theirs can run.

    sha256: the file's checksum, where it is known. section: the part of the config that names it, for errors.
    Raises DataError for a missing, damaged, other or unsafe file.
    """
    path = Path(os.path.expanduser(path))  # os.path's never raises
    if os.path.isdir(path):
        raise DataError(f"{path}: a folder, no file", f"name a file in it, or use {section}.source=local-dir:PATH")
    if not os.path.isfile(path):
        raise DataError(f"{path}: no such file", "check the path of the weights")
    if sha256 is not None:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != sha256:
            raise DataError(
                f"{path}: its sha256 is {digest}, not {section}.sha256", "download the file again, or fix the key"
            )
    if kind := _mistaken_for(path):
        raise DataError(f"{path}: it is {kind}, no weights", "download the file itself again")
    try:
        _require_honest_zip(path)
        if path.suffix == ".safetensors":
            return load_file(path)
        # MAE's and AMD's scripts keep their arguments beside the model; torch warns of odd pickles and goes on.
        with safe_globals([Namespace]), warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except READ_ERRORS as error:
        raise DataError(
            f"{path}: cannot be read as plain weights ({why_unreadable(error)})",
            "use a .safetensors file, or a .pth of tensors and plain values (pickled objects are refused)",
        ) from error


def why_unreadable(error: Exception) -> str:
    """The telling line of an error of reading: torch's begin with advice to trust the file."""
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"there is no {error.filename}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "file an issue" not in line]
    telling = [line.rpartition("Unpickler error: ")[2] for line in lines if re.search("GLOBAL|Unpickler error", line)]
    return f"{type(error).__name__}: {(telling or lines or ['no more is known'])[0][:200]}"


def _mistaken_for(path: Path) -> str | None:
    """What a file plainly is instead of weights; None where it may be weights."""
    with path.open("rb") as file:
        head = file.read(64).lstrip().lower()
    return next(
        (kind for beginning, kind in _MISTAKEN.items() if head.startswith(beginning)), None if head else "empty"
    )


def _require_honest_zip(path: Path) -> None:
    """Raises ValueError for a zip that would unpack to more than it is.

    torch's own writer stores without compression; its reader would allocate whatever a compressed entry says.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return
        total = sum(entry.file_size for entry in zipfile.ZipFile(file).infolist())
    if total > path.stat().st_size:
        raise ValueError(f"a zip of {path.stat().st_size:,} bytes that would unpack to {total:,}")
