"""Read the classes of validation images that lie in one folder, as ImageNet's do when they are downloaded.

    a file of --val-labels, records of the images, {class folder: label} -> the records with their labels

Four forms are read: ImageNet's `LOC_val_solution.csv` and any other `NAME,CLASS`, also with `;` or tabs, in quotes or
not, or `NAME CLASS`; one class per line, in the order of the file names (`imagenet_2012_validation_synset_labels.txt`);
and the devkit's numbers (`ILSVRC2012_validation_ground_truth.txt`), whose classes `meta.mat` beside it names.
"""

import csv
import re
from collections.abc import Sequence
from pathlib import Path

from maedistill.data.shards.records import Record, printable
from maedistill.errors import ConfigError, DataError, join_first

_META, _HEADER = "meta.mat", "imageid"
_BOX = re.compile(r"\s+-?\d+\s+-?\d+\s+-?\d+\s+-?\d+\b.*")  # behind the class in LOC_val_solution.csv


def read_val_labels(file: Path, records: list[Record], label_of: dict[str, int]) -> list[Record]:
    """Return the records with the labels that the file gives them.

    Raise `ConfigError` if there is no such file, `DataError` unless it names a known class for every image.
    """
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        rows = [row for row in _rows(lines, label_of) if row[0].casefold() != _HEADER]
    except OSError as error:
        raise ConfigError(f"--val-labels: {file} cannot be read: {error.strerror}", "name the file") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} is not text", "name a file with one class per line, or NAME,CLASS") from error
    if all(len(row) == 1 for row in rows):
        classes = [row[0] for row in rows]
        if len(rows) != len(records):
            raise DataError(
                f"{file} has {len(rows):,} lines for {len(records):,} images", "name the file of these images"
            )
        if all(name.isdecimal() and name not in label_of for name in classes):
            classes = _names_of_numbers(file, classes)
        class_of = dict(zip(sorted(record.origin for record in records), classes, strict=True))
    else:
        class_of = _classes_of_names(file, rows, records)
    labelled = []
    for record in records:
        name = class_of[record.origin]
        if name not in label_of:
            said = f"the class {name[:80]!r}, which is not a folder of train" if name else "no class"
            raise DataError(
                f"{file} gives {printable(record.origin)} {said}", "name a file with a class folder of each image"
            )
        labelled.append(record._replace(label=label_of[name]))
    return labelled


def _rows(lines: list[str], label_of: dict[str, int]) -> list[Sequence[str]]:
    """Return the name and the class of each line, or its class alone. Both may hold blanks if a mark parts them."""
    if all(line in label_of for line in lines):
        return [(line,) for line in lines]
    if mark := next((mark for mark in "\t;," if all(mark in line for line in lines)), None):
        rows = [[field.strip() for field in row] for row in csv.reader(lines, delimiter=mark, skipinitialspace=True)]
        return [[*row[:1], *(_BOX.sub("", kind) for kind in row[1:2])] for row in rows]
    parts = (_BOX.sub("", line).split(None, 1) for line in lines)
    # a class of several words, or one word and further columns
    return [row if len(row) < 2 or row[1] in label_of else [row[0], row[1].split()[0]] for row in parts]


def _classes_of_names(file: Path, rows: list[Sequence[str]], records: list[Record]) -> dict[str, str]:
    """Return the class of each record by its file name, else by the name without its suffix; empty if there is none.

    Raise `DataError` for a name with several classes.
    """
    said: dict[str, set[str]] = {}
    for name, kind in (row for row in rows if len(row) > 1):
        for key in {Path(name).name, Path(name).stem}:
            said.setdefault(key, set()).add(kind)
    class_of = {}
    for record in records:
        path = Path(record.origin)
        kinds = said.get(path.name) or said.get(path.stem) or {""}
        if len(kinds) > 1:
            raise DataError(
                f"{file} gives {printable(record.origin)} {len(kinds)} classes: {join_first(sorted(kinds), 5)}",
                "keep one line for each image, with its whole file name",
            )
        (class_of[record.origin],) = kinds
    return class_of


def _names_of_numbers(file: Path, numbers: list[str]) -> list[str]:
    """Return the WordNet ids of ILSVRC's own numbers, from the devkit's table of synsets."""
    try:
        from scipy.io import loadmat

        synsets = loadmat(file.parent / _META, squeeze_me=True)["synsets"]
        id_of = {str(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
        return [id_of[number] for number in numbers]
    except ModuleNotFoundError as error:
        raise ConfigError(f"{file} holds numbers, and reading {_META} needs scipy", "pip install scipy") from error
    except (OSError, KeyError, ValueError, TypeError, IndexError) as error:
        raise DataError(
            f"{file} holds numbers, and {file.parent / _META} does not say which classes they are ({error})",
            f"put {_META} of the devkit (ILSVRC2012_devkit_t12/data) beside it, or name a file with class names",
        ) from error
