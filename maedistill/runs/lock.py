"""An exclusive lock on a run folder, which the kernel releases when the owning process ends for any reason.

A POSIX record lock belongs to a process, not to a descriptor: loader workers that the owner forks do not inherit it,
and it works on NFS and Lustre if they support locks at all. The owner would also lose the lock by closing any other
descriptor of the file, so only this class opens it.
"""

import fcntl
import os
import platform
from pathlib import Path

from maedistill.errors import ConfigError


class FolderLock:
    """A lock held from construction until `release` or the end of the process."""

    def __init__(self, folder: Path, option: str = "run") -> None:
        """Take the lock. Raises ConfigError, which names `option` and the holder, if another process holds it."""
        self._file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # POSIX allows either error
            holder = os.read(self._file, 200).decode(errors="replace").strip() or "another process"
            os.close(self._file)
            raise ConfigError(
                f"{option}: {folder} is in use by {holder}", "wait until it has ended, or name another folder"
            ) from None
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)

    def release(self) -> None:
        """Release the folder before the process ends."""
        os.close(self._file)
