"""A source's images before they are written: one record each, by split, with what was found but is no image.

Source: {split: [Record(key, label, origin)]}, class names, read(record) -> bytes
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

# Files with these suffixes are taken for images unread. All others are looked at, so that no image is overlooked.
SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
    ".avif", ".jp2",
)  # fmt: skip


class Record(NamedTuple):
    """One image that will be written as a sample."""

    key: str
    label: int  # NO_LABEL if unlabelled
    origin: str  # the file's path relative to the source's folder, or the row in its array


@dataclass(frozen=True)
class Source:
    """The images of each split, not yet read. The index stores their provenance."""

    provenance: dict[str, Any]
    classes: tuple[str, ...]
    splits: dict[str, list[Record]]
    read: Callable[[Record], bytes]
    head: Callable[[Record], bytes] | None = None  # the first bytes of a file; None if there are no files
    passed_over: dict[str, Counter[str]] = field(default_factory=dict)  # split -> suffix -> files that are no images
    notes: tuple[str, ...] = ()  # what is unusual about the layout, for the summary


def printable(text: str) -> str:
    """Return a file name as text that every encoding of UTF-8 takes: bytes that are not UTF-8 become `\\xe9`."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
