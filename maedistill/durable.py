"""Files and folders that survive a power cut. A rename alone survives a kill, but may then lead to an empty file.

write_durably   a whole file: temporary name, sync of the file, rename, sync of its folder
make_folder     a folder, with the parents that it lacks
write_synced    a new file of a folder that its writer syncs and renames
sync            what was written otherwise
require_local   a path that is no address
"""

import os
import re
from pathlib import Path

from maedistill.errors import ConfigError

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # Path() makes s3:// into s3:/


def why_not_local(path: str | Path) -> tuple[str, str] | None:
    """Return what is wrong with an address in place of a path, which would become a folder `s3:`, and the remedy."""
    cause = f"{path} is an address, and must be a folder or file of this machine"
    return (cause, "name a local path, and copy it to the store afterwards") if _ADDRESS.match(str(path)) else None


def require_local(path: str | Path, name: str) -> None:
    """Raise `ConfigError` for an address in place of a path."""
    if problem := why_not_local(path):
        raise ConfigError(f"{name}: {problem[0]}", problem[1])


def write_durably(path: Path, data: bytes) -> None:
    """Replace or make a file. Raises OSError if the disk refuses it; the previous file is then still there."""
    # several processes may write the same file
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        write_synced(temporary, data)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder and the parents that it lacks, unless it is there."""
    if not os.path.isdir(path):  # Path.is_dir raises for too long a name
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file and sync it. Its name survives a power cut only once its folder is synced."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Sync a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
