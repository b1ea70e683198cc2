"""Expand what a user names as shards, such as `data.train`, to a sorted list: a folder, one tar, a glob or a range.

    DIR    DIR/train-000000.tar    DIR/train-*.tar    DIR/train-{000000..000008}.tar    DIR/train-{000000,000003}.tar

DIR is a folder or, in a pattern, the URL of one: https://HOST/DIR, s3://BUCKET/DIR, gs://BUCKET/DIR,
hf://datasets/USER/NAME. A folder alone means the shards of one split in it. A folder that exists is taken as it is
written; wildcards and braces in its name are letters.
Patterns are expanded here. They never reach a shell, or a library that would run a `pipe:` command.
"""

import difflib
import glob
import itertools
import os
import re
import shlex
from typing import Literal

from maedistill.data.remote.download import list_urls
from maedistill.data.remote.urls import check_url, is_url
from maedistill.data.shards.records import SUFFIXES
from maedistill.errors import ConfigError, DataError, join_first
from maedistill.escaping import masked

MOST_NAMES = 1_000_000  # a limit that catches typing errors such as {0..99999999}
MOST_LETTERS = 500_000_000  # of all names together, so that a long pattern cannot exhaust memory
MOST_SHOWN = 200  # characters of a pattern or path in an error
LONGEST_PATH = 4096  # characters; Linux allows as many bytes

Split = Literal["train", "val"]
_STEMS = {"train": ("train",), "val": ("val", "validation", "valid")}  # what the shards of a split are called
_MOST_LOOKED_AT = 10_000  # names in a folder that are searched for an image

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"([0-9]{1,18})\.\.([0-9]{1,18})")  # int() refuses 4,300 digits
_UNPRINTABLE = re.compile("[\0-\x1f\x7f\ud800-\udfff]")  # surrogates represent bytes that are not UTF-8


def find_shards(shards: str, *, split: Split = "train") -> tuple[str, ...]:
    """Return the absolute paths or URLs of the shards, sorted by name, all in one folder. URLs are not opened here.

    split: which shards of a folder are meant. Raise `ConfigError` for an invalid pattern, `DataError` for missing
    files.
    """
    pattern = repr(_cut(shards))
    if _UNPRINTABLE.search(shards):
        raise ConfigError(f"{pattern} has a character that is not text", "write one plain line in UTF-8")
    names = _expand_local(shards.removeprefix("file://") if shards.startswith("file:///") else shards, split)
    if (longest := max(map(len, names))) > LONGEST_PATH:
        raise ConfigError(f"{pattern} gives paths of {longest:,} characters", f"at most {LONGEST_PATH:,} are allowed")
    is_remote = any(map(is_url, names))  # test the expanded names: `{pi,}pe:...` is as unsafe as `pipe:...`
    paths = sorted(path for name in names for path in (_expand_url(name) if is_remote else _expand_path(name)))
    if not paths:
        raise DataError(f"no file matches {pattern}", "check the path, or write shards with maedistill shards")
    if len(paths) == 1 and not paths[0].endswith(".tar") and not is_remote and not os.path.exists(paths[0]):
        raise DataError(f"there is no folder {pattern}", _nearest_folder(paths[0]))
    if not is_remote and (missing := [path for path in paths if not os.path.isfile(path)]):
        raise DataError(
            f"{len(missing)} of {len(paths)} shards are missing: {join_first(list(map(_cut, missing)), 5)}",
            "copy the missing shards, or correct the range in the pattern",
        )
    if unprintable := next(filter(_UNPRINTABLE.search, paths), None):
        raise DataError(f"the name of {_cut(unprintable)!r} is not plain text", "rename the file, or leave it out")
    if repeated := next((path for path, after in itertools.pairwise(paths) if path == after), None):
        raise ConfigError(f"{pattern} names {_cut(repeated)} twice", "name each shard once")
    if len(folders := sorted(set(map(os.path.dirname, paths)))) > 1:
        raise ConfigError(
            f"{pattern} spans several folders: {join_first(list(map(_cut, folders)), 5)}",
            "put the shards in one folder",
        )
    return tuple(paths)


def describe_shards(shards: str, paths: tuple[str, ...]) -> str:
    """Return what the user named and, for a folder, which shards it means: `photos (train-000000.tar)`."""
    if is_url(shards) or not os.path.isdir(os.path.expanduser(shards)):
        return shards
    names = dict.fromkeys((os.path.basename(paths[0]), os.path.basename(paths[-1])))
    return f"{shards} ({' to '.join(names)})"


def expand_braces(pattern: str) -> list[str]:
    """Expand `a-{08..10}-{x,y}` to a-08-x, a-08-y, a-09-x, ...; a range keeps its leading zeros."""
    parts = _BRACES.split(pattern)  # text and brace contents alternate
    if any(brace in text for text in parts[::2] for brace in "{}"):
        raise ConfigError(f"{_cut(pattern)!r} has an unmatched brace", "write a range as {000000..000008}")
    choices = [[part] if i % 2 == 0 else _expand_choices(part, pattern) for i, part in enumerate(parts)]
    total = 1
    for choice in choices:
        total *= len(choice)
        if total > MOST_NAMES or total * len(pattern) > MOST_LETTERS:  # a name is never longer than its pattern
            remedy = f"at most {MOST_NAMES:,} are allowed: check the range"
            raise ConfigError(f"{_cut(pattern)!r} expands to {total:,} shards or more", remedy)
    return ["".join(row) for row in itertools.product(*choices)]


def split_name(paths: tuple[str, ...]) -> str:
    """Return the common prefix of the shards' names: 'train' for train-000000.tar ...; 'shards' if there is none."""
    stems = [os.path.basename(path).removesuffix(".tar") for path in paths]
    shared = os.path.commonprefix(stems)  # noqa: RUF071 compare characters, not path components
    return shared.rstrip("0123456789-_.") or "shards"


def _expand_choices(inside: str, pattern: str) -> list[str]:
    """Expand the contents of one pair of braces. The range is checked before anything large is built."""
    braces = _cut(f"{{{inside}}}")
    if "," in inside:
        return inside.split(",")
    match = _RANGE.fullmatch(inside)
    if not match:
        raise ConfigError(f"{braces} in {_cut(pattern)!r} is not a range", "write a range as {000000..000008}")
    first, last = match.groups()
    width = len(first) if first.startswith("0") and len(first) > 1 else 0
    if int(first) > int(last) or (width and len(last) != width):
        raise ConfigError(
            f"the range {braces} in {_cut(pattern)!r} runs backwards or changes its width",
            "write both ends with the same number of digits, the smaller first",
        )
    numbers = range(int(first), int(last) + 1)
    if len(numbers) > MOST_NAMES:
        raise ConfigError(f"{braces} expands to {len(numbers):,} shards", f"at most {MOST_NAMES:,} are allowed")
    return [str(number).zfill(width) for number in numbers]


def _expand_url(url: str) -> list[str]:
    check_url(url)
    urls = list_urls(url) if glob.has_magic(url) else [url]
    for each in urls:
        check_url(each)
    return urls


def _expand_local(shards: str, split: Split) -> list[str]:
    """Expand a folder to its split and braces to names. What exists as it is written has no braces to expand."""
    if is_url(shards):
        return expand_braces(shards)
    path = os.path.expanduser(shards)
    if os.path.isdir(path):
        return _shards_of_folder(path, split)
    if os.path.exists(path):
        return [path]
    folder, name = os.path.split(path)
    if folder and os.path.isdir(folder):
        return [os.path.join(folder, each) for each in expand_braces(name)]
    return expand_braces(shards)


def _shards_of_folder(folder: str, split: Split) -> list[str]:
    """Return the shards of a split in a folder, or all of them if their names tell no splits apart.

    Raise `ConfigError` for a folder without shards, or with the shards of several sets.
    """
    tars = sorted(name for name in os.listdir(folder) if name.endswith(".tar") and not name.startswith("."))
    sets: dict[str, list[str]] = {}
    for name in tars:
        sets.setdefault(split_name((name,)), []).append(name)
    chosen = next((stem for stem in _STEMS[split] if stem in sets), None)
    if chosen is None and len(sets) == 1 and not sets.keys() & {stem for stems in _STEMS.values() for stem in stems}:
        (chosen,) = sets
    if chosen is not None:
        return [os.path.join(folder, name) for name in sets[chosen]]
    if tars:
        patterns = [repr(os.path.join(folder, f"{stem}-*.tar")) for stem in sets]
        cause = f"the folder {_cut(folder)!r} has no shards {split}-*.tar, but {join_first(sets, 5)}"
        raise ConfigError(cause, f"name the shards that are meant: {join_first(patterns, 3, separator=' or ')}")
    if not _holds_image(folder):
        raise ConfigError(f"the folder {_cut(folder)!r} holds no shards", "name a folder of .tar shards, or of images")
    out = os.path.join("shards", os.path.basename(os.path.abspath(folder)))
    command = shlex.join(["maedistill", "shards", folder, out])
    raise ConfigError(
        f"{_cut(folder)!r} is a folder of images, but shards are needed here",
        f"write shards once: {command}; then name {shlex.quote(out)}",
    )


def _holds_image(folder: str) -> bool:
    """Return whether there is an image among the first names below a folder."""
    found = (name for _, _, names in os.walk(folder, followlinks=False) for name in names)
    return any(name.lower().endswith(SUFFIXES) for name in itertools.islice(found, _MOST_LOOKED_AT))


def _expand_path(name: str) -> list[str]:
    """Expand a glob. A path or folder that exists is taken as it is written, because its name may contain `[`."""
    path = os.path.abspath(os.path.expanduser(name))
    if not glob.has_magic(path) or os.path.exists(path):
        return [path]
    folder, last = os.path.split(path)
    return glob.glob(os.path.join(glob.escape(folder) if os.path.isdir(folder) else folder, last))


def _nearest_folder(path: str) -> str:
    """Return a remedy for a missing folder: one beside it of a similar name, if there is one."""
    parent, name = os.path.split(path)
    beside = [entry.name for entry in os.scandir(parent) if entry.is_dir()] if os.path.isdir(parent) else []
    near = difflib.get_close_matches(name, beside, n=1)
    written = "check the path, or write shards with maedistill shards"
    return f"did you mean {os.path.join(parent, near[0])}?" if near else written


def _cut(text: str) -> str:
    """Return the text without secrets, and without its middle if it is long."""
    text = masked(text)
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN // 2]}...{text[-MOST_SHOWN // 2 :]}"
