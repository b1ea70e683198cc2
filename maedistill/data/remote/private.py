"""Files of this user alone, in a folder that nobody else can write to, and locks that are not waited for forever.

A user who can write to a cache folder could plant a link that makes us overwrite another file, put other bytes where we
look for a shard, or hold a lock. So the folder must be ours and closed to others, and whatever is opened in it is
checked on the open file, not by name.
"""

import fcntl
import os
import stat
import time
from contextlib import suppress
from pathlib import Path

from maedistill.errors import ConfigError, DataError
from maedistill.escaping import warn

_POLL = 0.05  # seconds between two attempts to lock
_NOTICE = 10.0  # seconds of waiting after which the holder of a lock is named
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def open_private_folder(folder: Path, remedy: str) -> int:
    """Create the folder if it does not exist, close it to other users, and return its descriptor.

    Raise `ConfigError` with this remedy if it belongs to another user, or if others could write to it: what is in it
    cannot be trusted.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        state = os.fstat(descriptor)
        if state.st_uid != os.geteuid():
            raise ConfigError(f"the cache {folder} belongs to another user", remedy)
        if state.st_mode & _OTHERS_WRITE:
            raise ConfigError(
                f"other users can write to the cache {folder}",
                f"{remedy}; or, if you trust what is in it, chmod 700 {folder}",
            )
        if stat.S_IMODE(state.st_mode) != 0o700:
            os.fchmod(descriptor, 0o700)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def open_private_file(path: Path, flags: int) -> int:
    """Open a plain file of this user; with O_CREAT in `flags` make it if there is none.

    Anything else of that name (a link, a second name of another file, another user's file) is removed first, without
    touching what it points to. Raise FileNotFoundError, or another OSError.
    """
    flags |= os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a named pipe would block
    if _is_private(path):
        descriptor = os.open(path, flags, 0o600)
        if _is_plain(os.fstat(descriptor)):
            return descriptor
        os.close(descriptor)
    warn(f"{path} is not a file of the cache: it is removed, and what it points to is left as it is")
    path.unlink(missing_ok=True)
    return os.open(path, flags, 0o600)


def lock(descriptor: int, kind: int, *, seconds: float, name: Path) -> None:
    """Lock a file (LOCK_SH or LOCK_EX). Name a holder that is waited for long; raise `DataError` after `seconds`."""
    began, noticed = time.monotonic(), False
    while not try_lock(descriptor, kind):
        waited = time.monotonic() - began
        if waited > seconds:
            raise DataError(
                f"{name} has been locked for {waited:.0f} s by {_holder(descriptor)}",
                "end that process, or use another cache folder",
            )
        if waited > _NOTICE and not noticed:
            noticed = True
            warn(f"waiting for {name}, which is locked by {_holder(descriptor)}")
        time.sleep(_POLL)


def try_lock(descriptor: int, kind: int = fcntl.LOCK_EX) -> bool:
    """Lock a file if no other process holds it. Return whether it did."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_private(path: Path) -> bool:
    """Return whether there is nothing of this name, or a plain file of ours."""
    try:
        return _is_plain(os.lstat(path))
    except FileNotFoundError:
        return True


def _is_plain(state: os.stat_result) -> bool:
    """Return whether this is a regular file of this user with at most one name (none: it has just been removed)."""
    return stat.S_ISREG(state.st_mode) and state.st_uid == os.geteuid() and state.st_nlink <= 1


def _holder(descriptor: int) -> str:
    """Return which process holds the lock of a file, as far as this machine knows."""
    state = os.fstat(descriptor)
    place = f"{os.major(state.st_dev):02x}:{os.minor(state.st_dev):02x}:{state.st_ino}"
    with suppress(OSError):
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            if len(words) > 5 and words[1] == "FLOCK" and words[5] == place:
                command = Path(f"/proc/{words[4]}/comm").read_text().strip()
                return f"process {words[4]} ({command})"
    return "another process"
