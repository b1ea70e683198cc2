"""Manifests that prove a folder intact: all files are synced to disk, and the manifest has the checksum of every file.

    FOLDER/manifest.json    {"format": 1, "files": {name: {"bytes": size, "sha256": hex}}}
    FOLDER/COMPLETE         sha256 of manifest.json, written last

`write_manifest` writes both. `verify` trusts nothing that it reads: a folder is intact, or `CorruptCheckpoint` says
what is wrong with it. Files that are not in the manifest are not verified.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NoReturn

from maedistill.durable import sync, write_synced

MANIFEST, COMPLETE = "manifest.json", "COMPLETE"
_LARGEST_TEXT = 1_000_000  # bytes; larger text files are rejected


class CorruptCheckpoint(Exception):
    """A folder does not match its manifest; the message says why."""


def write_manifest(folder: Path) -> None:
    """Sync every file of the folder to disk, then write manifest.json and COMPLETE."""
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.iterdir())}
    for name in files:
        sync(folder / name)
    write_synced(folder / MANIFEST, json.dumps({"format": 1, "files": files}, indent=1).encode())
    write_synced(folder / COMPLETE, _sha256(folder / MANIFEST).encode())
    sync(folder)


def verify(folder: Path, only: str | None = None) -> None:
    """Raise CorruptCheckpoint unless all files of the manifest, or the one named `only`, match it."""
    files = read_manifest(folder)
    if only is not None and only not in files:
        raise CorruptCheckpoint("the checkpoint has no such file")
    for name in files if only is None else (only,):
        path, (size, checksum) = folder / name, files[name]
        try:
            if not path.is_file() or path.stat().st_size != size:
                raise CorruptCheckpoint(f"{name} is missing or has another size")
            if _sha256(path) != checksum:
                raise CorruptCheckpoint(f"{name} has another checksum")
        except OSError as error:
            raise CorruptCheckpoint(f"{name} cannot be read: {error}") from error


def read_manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """Return {name: (bytes, sha256)} of the manifest's files. Raises CorruptCheckpoint for an invalid manifest."""
    for name in (MANIFEST, COMPLETE):
        if not (folder / name).is_file():
            raise CorruptCheckpoint(f"{name} is missing")
    if read_text(folder / COMPLETE) != hashlib.sha256(read_text(folder / MANIFEST).encode()).hexdigest():
        raise CorruptCheckpoint(f"{MANIFEST} does not match {COMPLETE}")
    files = read_json(folder / MANIFEST).get("files")
    if not isinstance(files, dict) or not all(_is_entry(name, entry) for name, entry in files.items()):
        raise CorruptCheckpoint(f"{MANIFEST} is no list of files")
    return {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in a small file. Raises CorruptCheckpoint for anything else, including NaN and infinity."""
    try:
        value = json.loads(read_text(path), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{path.name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CorruptCheckpoint(f"{path.name} is not a JSON object")
    return value


def read_text(path: Path) -> str:
    """Read a small text file. Raises CorruptCheckpoint if it is unreadable or too large."""
    try:
        with open(path, "rb") as file:
            data = file.read(_LARGEST_TEXT + 1)
        text = data.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptCheckpoint(f"{path.name} cannot be read: {error}") from error
    if len(data) > _LARGEST_TEXT:
        raise CorruptCheckpoint(f"{path.name} is larger than {_LARGEST_TEXT:,} bytes")
    return text


def follow_umask(path: Path) -> None:
    """Give a file the permissions of a new one: safetensors writes files that only their owner can read.

    A process can read its umask only by changing it, which other threads would notice, so this makes a file.
    """
    probe = path.with_name(f"{path.name}.mode")
    descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        os.chmod(path, os.fstat(descriptor).st_mode & 0o777)
    finally:
        os.close(descriptor)
        probe.unlink()


def _is_entry(name: str, entry: object) -> bool:
    """Return whether a manifest entry has a plain file name, a size and a checksum, so that it stays in the folder."""
    plain = name not in ("", ".", "..") and not {"/", "\\", "\0"} & set(name)
    return plain and isinstance(entry, dict) and type(entry.get("bytes")) is int and type(entry.get("sha256")) is str


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
