"""List an image folder: splits, class folders, images by their content, and everything that is passed over.

    FOLDER/[split/]class/image -> open_folder -> Source

Nothing is left out without a word: a folder that cannot be listed, a class without an image and a layout that would
mix training and test images are errors, and files that are no images are counted by suffix.
"""

import hashlib
import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from maedistill.data.images.decode import BadImage, is_image
from maedistill.data.shards.records import SUFFIXES, Record, Source, printable
from maedistill.data.shards.scan import NO_LABEL
from maedistill.data.shards.val_labels import read_val_labels
from maedistill.errors import ConfigError, DataError, join_first

SPLITS = {  # folder, in any case, also with _set or -set behind it -> split
    "train": "train", "training": "train",
    "val": "val", "validation": "val", "valid": "val", "eval": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
_LIKE_SPLITS = {**SPLITS, "trainset": "train", "testset": "test", "valset": "val", "evaluation": "val"}
_SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")  # as if hidden
HIDDEN = "hidden"  # instead of a suffix
LARGEST_FILE = 1 << 30  # bytes; no image of a real data set is that large
LONGEST_KEY = 80  # characters; a plain tar header holds names of up to 100
_HEAD = 64  # bytes, more than any header that tells the depth
Listing = tuple[list[str], list[str], Counter[str]]  # images, folders at the top, passed over by suffix


def open_folder(folder: Path, *, val_fraction: float = 0.0, val_labels: str | None = None) -> Source:
    """List a folder of `class/image` or of plain images, directly or below the folders of SPLITS. Sort the classes.

    val_fraction: share of each class to hold out. val_labels: a file that names the class of each image of a `val`
    without class folders. Raise `ConfigError` or `DataError` for a layout in which images would be left out silently
    or taken for what they are not.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is neither a folder nor cifar10, imagenet or digits", "correct the path")
    if not 0 <= val_fraction < 1:
        raise ConfigError(
            f"--val-fraction is {val_fraction:g}", "give a share below 1, e.g. 0.1: each class keeps a training image"
        )
    names = _split_names(folder)  # split -> folder
    if names and val_fraction:
        raise ConfigError(f"{folder} has its own splits: {', '.join(names.values())}", "leave --val-fraction out")
    listings = {split: _list_images(folder / name) for split, name in (names or {"train": ""}).items()}
    is_split = "train" in listings and "val" in listings
    if val_labels is not None and (not is_split or _is_flat(listings["train"]) or not _is_flat(listings["val"])):
        raise ConfigError(
            f"--val-labels cannot be used with {folder}",
            "it is for images in a folder val without class folders, next to a folder train with class folders",
        )
    classes = _class_names(folder, names, listings, val_labels=val_labels)
    label_of = {_composed(name): label for label, name in enumerate(classes)}
    splits = {split: _records(names.get(split, ""), images, label_of) for split, (images, _, _) in listings.items()}
    if val_labels is not None:
        splits["val"] = read_val_labels(Path(val_labels), splits["val"], label_of)
    if val_fraction:
        splits = _hold_out(splits["train"], val_fraction)
    provenance = {"source": "folder", "name": printable(folder.resolve().name), "val_fraction": val_fraction}
    passed_over = {split: passed for split, (_, _, passed) in listings.items() if passed}
    return Source(
        provenance,
        tuple(printable(_composed(name)) for name in classes),
        splits,
        lambda record: _read_file(folder / record.origin),
        lambda record: _read_file(folder / record.origin, most=_HEAD),
        passed_over,
        tuple(_notes(names, listings, classes)),
    )


def _split_names(folder: Path) -> dict[str, str]:
    """Return the folder of each split that exists, in the order of SPLITS; empty if the images are not split."""
    inside = [name for name in _subfolders(folder) if name not in _SYSTEM_FOLDERS]
    found = [(split, name) for word, split in SPLITS.items() for name in inside if _split_word(name) == word]
    names, chosen = dict(found), [name for _, name in found]
    others = [name for name in inside if name not in chosen]
    if names and others:
        raise ConfigError(
            f"{folder} holds the split {chosen[0]} and also {printable(others[0])}, which is not a split",
            f"put classes below {', '.join(SPLITS)}; if {chosen[0]} is a class, put all class folders below train",
        )
    if len(names) < len(chosen):
        raise ConfigError(f"{folder} holds {' and '.join(chosen)}: both mean the same split", "keep one of them")
    if not names and (similar := _similar_to_splits(inside)):
        raise ConfigError(
            f"{folder} holds {join_first(list(map(printable, similar)), 5)}, which look like splits, not classes",
            "rename them to train, val and test, each with its class folders or images directly below it",
        )
    return names


def _split_word(name: str) -> str:
    """Return a folder's name in lower case without `_set`: `Training_Set` -> training."""
    return re.sub(r"[ _-]?set$", "", name.casefold())


def _similar_to_splits(names: list[str]) -> list[str]:
    """Return the folders whose names hold the word of a split if most do so and two splits are among them."""
    words = {name: set(re.findall("[a-z]+", name.casefold())) & _LIKE_SPLITS.keys() for name in names}
    similar = [name for name in names if words[name]]
    meant = {_LIKE_SPLITS[word] for name in similar for word in words[name]}
    return similar if "train" in meant and len(meant) > 1 and len(similar) > len(names) / 2 else []


def _subfolders(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise _unlistable(error) from error


def _list_images(folder: Path) -> Listing:
    """List the image paths below `folder`, sorted, with forward slashes; count everything else. Follow links.

    Hidden files and folders are only counted. Raise `DataError` if there is no image, for a folder that cannot be
    listed, or for a link to a folder above it, which would list images without end.
    """
    images: list[str] = []
    passed: Counter[str] = Counter()
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=_refuse):
        hidden = [name for name in folders if name.startswith(".") or name in _SYSTEM_FOLDERS]
        folders[:] = [name for name in folders if name not in hidden]
        passed[HIDDEN] += len(hidden)
        for path in (os.path.join(parent, name) for name in folders):
            if os.path.islink(path) and Path(os.path.realpath(parent)).is_relative_to(os.path.realpath(path)):
                raise DataError(f"{printable(path)} is a link to a folder above it", "remove the link")
        for name in names:
            if name.startswith("."):
                passed[HIDDEN] += 1
            elif name.lower().endswith(SUFFIXES) or _holds_image(os.path.join(parent, name)):
                images.append((Path(parent).relative_to(folder) / name).as_posix())
            else:
                passed[printable(os.path.splitext(name)[1].lower()) or "no suffix"] += 1
    passed = +passed  # without zeros
    if not images:
        others = f", but {count_by_suffix(passed)}" if passed else ""
        raise DataError(f"{printable(str(folder))} holds no images{others}", _CONVERT)
    return sorted(images), _subfolders(folder), passed


_CONVERT = f"images are files that end in {', '.join(SUFFIXES)}, or hold one of these formats; convert others first"


def _holds_image(path: str) -> bool:
    """Return whether a file with a suffix that says nothing holds an image of a format that is read."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe could wait without end
            return False
        with open(path, "rb") as file:
            return is_image(file)
    except OSError:  # counted by its suffix, as what no one can read
        return False


def _refuse(error: OSError) -> None:
    raise _unlistable(error) from error


def _unlistable(error: OSError) -> DataError:
    return DataError(
        f"the folder {printable(str(error.filename))} cannot be listed: {error.strerror}",
        "check its permissions and the disk or network drive, or move it away: its images would be missing",
    )


def _is_flat(listing: Listing | None) -> bool:
    return listing is not None and not any("/" in path for path in listing[0])


def _class_names(
    folder: Path, names: dict[str, str], listings: dict[str, Listing], *, val_labels: str | None
) -> tuple[str, ...]:
    """Return the class folders of the first split (train, if there is one); empty if its images are in no folder."""
    first = next(iter(listings))
    classes = {
        split: {path.split("/")[0] for path in images if "/" in path} for split, (images, _, _) in listings.items()
    }
    for split, (images, folders, _) in listings.items():
        flat = [path for path in images if "/" not in path]
        if 0 < len(flat) < len(images):
            raise DataError(
                f"{folder}: {len(flat)} images are outside the class folders, first {printable(flat[0])!r}",
                "move them into a class folder or away; without any class folder the images are unlabelled",
            )
        _refuse_splits_inside(folder / names.get(split, ""), images)
        known = {_composed(name) for name in classes[first]}
        if len(known) < len(classes[first]):
            raise DataError(
                f"two class folders of {folder / names.get(first, '')} have the same name in different encodings",
                "rename one of them, or put their images together",
            )
        if foreign := [name for name in sorted(classes[split]) if _composed(name) not in known]:
            raise DataError(
                f"{folder / names[split]} has the class {printable(foreign[0])!r}, which is missing from "
                f"{names[first]} ({len(foreign)} such)",
                "give all splits the same class folders",
            )
        empty = [name for name in folders if classes[first] and name not in (*classes[split], *_SYSTEM_FOLDERS)]
        if empty and split == first:
            raise DataError(
                f"{len(empty)} class folders of {folder / names.get(split, '')} hold no image: "
                f"{join_first([_describe_contents(folder / names.get(split, '') / name) for name in empty], 5)}",
                f"remove them if they are no classes; {_CONVERT}",
            )
    if classes[first] and _is_flat(listings.get("val")) and val_labels is None:
        raise DataError(
            f"{folder / names['val']} has no class folders, but {names[first]} has: its "
            f"{len(listings['val'][0]):,} images would have no label",
            "move them into class folders; or name a file with their classes, e.g. --val-labels LOC_val_solution.csv, "
            "imagenet_2012_validation_synset_labels.txt or ILSVRC2012_validation_ground_truth.txt of the devkit",
        )
    return tuple(sorted(classes[first]))


def _refuse_splits_inside(folder: Path, images: Sequence[str]) -> None:
    """Refuse class folders that hold splits: training and test images would be mixed."""
    inside = {tuple(path.split("/", 2)[:2]) for path in images if path.count("/") > 1}
    splits = {SPLITS[word] for _, name in inside if (word := _split_word(name)) in SPLITS}
    if len(splits) > 1:
        first = min(printable("/".join(pair)) for pair in inside if _split_word(pair[1]) in SPLITS)
        raise DataError(
            f"{printable(str(folder))} holds splits below its folders, first {first}: they would be mixed",
            "name the folder that holds train, val or test, with the class folders below these",
        )


def _describe_contents(folder: Path) -> str:
    """Return a class folder's name and what is in it instead of images."""
    count = Counter(
        os.path.splitext(name)[1].lower() or "no suffix" for _, _, names in os.walk(folder) for name in names
    )
    return f"{printable(folder.name)} ({count_by_suffix(count) or 'empty'})"


def count_by_suffix(count: Counter[str]) -> str:
    """Format a count of files: `12 .txt, 3 .heic`."""
    return join_first([f"{number:,} {suffix}" for suffix, number in count.most_common()], 10)


def _notes(names: dict[str, str], listings: dict[str, Listing], classes: tuple[str, ...]) -> list[str]:
    """Return what a user should know of the layout."""
    notes, first = [], next(iter(listings))
    deeper = {path.rsplit("/", 1)[0] for path in listings[first][0] if path.count("/") > 1}
    if classes and deeper:
        notes.append(
            f"{len(deeper):,} folders lie below class folders, first {printable(min(deeper))}: the topmost is the class"
        )
    for split, (images, _, _) in listings.items():
        folders = {path.split("/")[0] for path in images if "/" in path}
        if others := sorted(folders - set(classes)):
            notes.append(
                f"{len(others):,} class folders of {names[split]} are named as in {names[first]}, in another form of "
                f"Unicode, first {printable(others[0])}: they are the same classes"
            )
        present = set(map(_composed, folders))
        absent = [printable(name) for name in classes if _composed(name) not in present]
        if present and absent:
            notes.append(f"{names[split]} has no image of {len(absent):,} classes: {join_first(absent, 5)}")
    return notes


def _hold_out(records: list[Record], share: float) -> dict[str, list[Record]]:
    """Move a share of the images of each class to `val`, by the hash of the key: the same on every machine.

    Each class keeps at least one training image. The r-th image of n of a class comes at (r + u) / n of the way, with
    u in [0, 1) by the class, so that all classes give their share, and small ones give one in turn.
    """
    by_class: dict[int, list[tuple[bytes, Record]]] = {}
    for record in records:
        digest = hashlib.sha256(f"validation/{record.key}".encode()).digest()
        by_class.setdefault(record.label, []).append((digest, record))
    places: list[tuple[float, bytes, Record]] = []
    for label, ranked in by_class.items():
        ranked.sort()
        start = int.from_bytes(hashlib.sha256(f"validation of class {label}".encode()).digest()[:4], "big") / 2**32
        places += [((r + start) / len(ranked), *pair) for r, pair in enumerate(ranked[:-1])]
    if not places:
        raise ConfigError("--val-fraction would leave no training image", "add images, or leave --val-fraction out")
    places.sort()
    chosen = {record.key for _, _, record in places[: max(1, round(share * len(records)))]}
    ordered = [record for _, record in sorted(pair for ranked in by_class.values() for pair in ranked)]
    return {
        "train": [record for record in ordered if record.key not in chosen],
        "val": [record for record in ordered if record.key in chosen],
    }


def _records(split: str, paths: list[str], label_of: dict[str, int]) -> list[Record]:
    """Return records with unique keys: where paths share a key (`a.jpg`, `a.png`), append a hash of the path."""
    keys, records = list(map(_safe_key, paths)), []
    count = Counter(keys)
    for key, path in zip(keys, paths, strict=True):
        label = label_of[_composed(path.split("/")[0])] if "/" in path else NO_LABEL
        unique = key if count[key] == 1 else f"{key}-{_short_hash(path)}"
        records.append(Record(unique, label, f"{split}/{path}" if split else path))
    return records


def _composed(name: str) -> str:
    """Return a class name in one form of Unicode: macOS writes é as two characters, Linux as one."""
    return unicodedata.normalize("NFC", name)


def _safe_key(path: str) -> str:
    """Map `n01440764/n01440764_10026.JPEG` to n01440764_10026, `cat/A 1.jpg` to cat_A_1; end a long key in a hash."""
    *folders, name = path.split("/")
    stem = name.rpartition(".")[0] or name
    if folders and not stem.startswith(folders[-1] + "_"):
        stem = "_".join([*folders, stem])
    key = re.sub(r"[^A-Za-z0-9_-]", "_", stem)
    return key if len(key) <= LONGEST_KEY else f"{key[:LONGEST_KEY]}-{_short_hash(path)}"


def _short_hash(path: str) -> str:
    return hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()[:8]


def _read_file(path: Path, *, most: int = -1) -> bytes:
    """Read a file, or its first bytes. Raise `BadImage` for a pipe or device, which may never end, or a huge file."""
    if not path.is_file():
        raise BadImage("it is no file" if path.exists() else "there is no such file")
    if (size := path.stat().st_size) > LARGEST_FILE:
        raise BadImage(f"{size:,} bytes, more than {LARGEST_FILE:,}")
    with open(path, "rb") as file:
        return file.read(most)
