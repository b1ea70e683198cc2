"""Decoded images kept in memory that all ranks and loader processes of a machine share, so that each is decoded once.

    KeptImages.create -> address -> KeptImages.open in the other ranks -> loader processes, which are forked
    get(i) -> uint8 [3, H, W]; None -> decode -> put(i, image)

The memory is an anonymous file (memfd) in no file system. So it does not depend on the size of /dev/shm, and the kernel
frees it with the last process that uses it. A page of it exists once an image has been written there.

    n images
"""

import fcntl
import mmap
import os
import uuid

import torch
from torch import Tensor


class KeptImages:
    """Images with the ids 0 to n - 1, as they come, as far as they fit into the file.

    file: 0 at first. It holds int64 [n + 1], the first byte of each image, or 0, and the first free byte; int32 [n, 2],
    heights and widths; then the pixels, channels last.
    """

    def __init__(self, file: int, count: int) -> None:
        self._file, self._count, self._end = file, count, os.fstat(file).st_size
        memory = mmap.mmap(file, self._end)
        self._bytes = torch.frombuffer(memory, dtype=torch.uint8)
        self._starts = memoryview(memory)[: 8 * (count + 1)].cast("q")
        self._sides = memoryview(memory)[8 * (count + 1) : table_bytes(count)].cast("i")

    @classmethod
    def create(cls, count: int, capacity: int) -> "KeptImages":
        """Return room for n = `count` images, in `capacity` bytes. Raise `OSError` where the system has none."""
        file = os.memfd_create(f"maedistill-{uuid.uuid4().hex}")
        try:
            os.ftruncate(file, capacity)
            os.posix_fallocate(file, 0, table_bytes(count))  # a page that the system refuses would later be a SIGBUS
        except OSError:
            os.close(file)
            raise
        kept = cls(file, count)
        kept._starts[count] = table_bytes(count)
        return kept

    @classmethod
    def open(cls, address: tuple[str, str], count: int) -> "KeptImages":
        """Return what another process of this machine has created. Raise `OSError` if it cannot be reached."""
        path, name = address
        if os.readlink(path) != name:  # the process of that number in another container
            raise FileNotFoundError(f"{path} is not {name}")
        return cls(os.open(path, os.O_RDWR | os.O_CLOEXEC), count)

    @property
    def address(self) -> tuple[str, str]:
        """Return where other processes find the file while this process lives, and its name, which no other has."""
        path = f"/proc/{os.getpid()}/fd/{self._file}"
        return path, os.readlink(path)

    @property
    def used(self) -> int:
        """Return the bytes in use."""
        return self._starts[self._count]

    def get(self, i: int) -> Tensor | None:
        """Return image `i`, uint8 [3, H, W], channels last in memory, or None. It is not to be written to."""
        if start := self._starts[i]:
            return self._view(start, self._sides[2 * i], self._sides[2 * i + 1])
        return None

    def put(self, i: int, image: Tensor) -> None:
        """Keep image `i`, uint8 [3, H, W], if there is room. Several processes may do so at once."""
        (_, height, width), size = image.shape, image.numel()
        if self.used + size > self._end:
            return
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX)  # the kernel unlocks it when its process is killed
        except OSError:  # a system without locks
            return
        try:
            start = self.used
            if self._starts[i] or start + size > self._end:
                return
            os.posix_fallocate(self._file, start, size)
            self._starts[self._count] = start + size
            self._sides[2 * i], self._sides[2 * i + 1] = height, width
            self._view(start, height, width).copy_(image)
            self._starts[i] = start  # last, so that nobody sees a part of an image
        except OSError:
            self._starts[self._count] = self._end
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN)

    def _view(self, start: int, height: int, width: int) -> Tensor:
        return self._bytes.as_strided((3, height, width), (1, 3 * width, 3), start)

    def __del__(self) -> None:
        os.close(self._file)


def table_bytes(count: int) -> int:
    """Return the bytes that are needed in addition to the pixels of this many images."""
    return 8 * (count + 1) + 8 * count
