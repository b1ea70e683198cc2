"""Read an untrusted weights file, without executing its code or trusting the sizes that it states.

a.safetensors, a.pth -> read_weights_file -> its content: usually a dict of tensors, possibly nested in another dict
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

# Errors that reading a truncated or damaged file, or one without weights, may raise, depending on the damage.
READ_ERRORS = (
    SafetensorError, UnpicklingError, zipfile.BadZipFile, OSError, RuntimeError, EOFError, ValueError, LookupError,
    TypeError, AttributeError, AssertionError, MemoryError, struct.error,
)  # fmt: skip
# First bytes, in lower case, of files that are often downloaded in place of weights, and what they are.
_MISTAKEN = {b"<!doctype": "a web page", b"<html": "a web page", b"version https://git-lfs": "a pointer of Git LFS"}


def read_weights_file(path: str | Path, *, sha256: str | None = None, section: str = "teacher") -> object:
    """Return the content of a .safetensors or .pth file. Pickles are read weights-only, so their code cannot run.

    sha256: the file's expected checksum, if known. section: the config section that names the file, for errors.
    Raises DataError if the file is missing, damaged, unsafe, or not a weights file.
    """
    path = Path(os.path.expanduser(path))  # unlike Path.expanduser, it never raises
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
        # MAE's and AMD's checkpoints also hold the script's arguments, a Namespace; torch warns of unusual pickles.
        with safe_globals([Namespace]), warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except READ_ERRORS as error:
        raise DataError(
            f"{path}: cannot be read as plain weights ({why_unreadable(error)})",
            "use a .safetensors file, or a .pth of tensors and plain values (pickled objects are refused)",
        ) from error


def why_unreadable(error: Exception) -> str:
    """Return the informative line of a read error. torch's messages begin with advice to trust the file."""
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"there is no {error.filename}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "file an issue" not in line]
    telling = [line.rpartition("Unpickler error: ")[2] for line in lines if re.search("GLOBAL|Unpickler error", line)]
    return f"{type(error).__name__}: {(telling or lines or ['no more is known'])[0][:200]}"


def _mistaken_for(path: Path) -> str | None:
    """Return what a file is if it clearly holds no weights; None if it may hold weights."""
    with path.open("rb") as file:
        head = file.read(64).lstrip().lower()
    return next(
        (kind for beginning, kind in _MISTAKEN.items() if head.startswith(beginning)), None if head else "empty"
    )


def _require_honest_zip(path: Path) -> None:
    """Raise ValueError for a zip that would unpack to more bytes than it has.

    torch writes zips without compression, but its reader allocates whatever size a compressed entry states.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return
        total = sum(entry.file_size for entry in zipfile.ZipFile(file).infolist())
    if total > path.stat().st_size:
        raise ValueError(f"a zip of {path.stat().st_size:,} bytes that would unpack to {total:,}")
