"""Scorecards of runs and exports side by side: size, accuracy and latency, as a table and as one picture.

RUN, EXPORT or FILE.json ... -> a Row for each scored network -> OUT/comparison.md, comparison.json, comparison.png

A line of the picture joins the files of one network: formats and exits of one checkpoint. Rows share a panel if they
were measured alike: on one kind of processor with as many threads, on the same images.
"""

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError, model_validator

from maedistill.durable import make_folder, write_durably
from maedistill.errors import DataError, join_first
from maedistill.escaping import code, markdown
from maedistill.exporting.folder import NETWORK_FILES, RECORD
from maedistill.report.charts import Timed, latency_chart
from maedistill.report.formatting import markdown_table, percent
from maedistill.report.intervals import Interval, of_count
from maedistill.runs.manifest import CorruptCheckpoint, read_json
from maedistill.runs.records import write_errors, write_text
from maedistill.weights.from_timm import StrictModel, first_problem

HEADS = ("network", "top-1", "95 % interval", "size", "latency", "images/s", "parameters", "numbers", "machine", "data")
_OF_A_RUN = "scorecard.json"
_PICTURE = "comparison.png"
_PANELS = 8  # of a picture that can still be read
_OF_FORMATS = {f"scorecard_{kind}.json": kind for kind in NETWORK_FILES}
_WEIGHTS = NETWORK_FILES | {"timm": "model.safetensors"}  # whose size is that of a format
_WRITE = "maedistill export RUN --val SHARDS, or maedistill evaluate MODEL SHARDS --json FILE.json"
_Count = Annotated[int, Field(gt=0, le=10**15)]
_Name = Annotated[str, Field(max_length=200)]
_Measure = Annotated[float, Field(gt=0, le=1e15, allow_inf_nan=False)]


class Scorecard(StrictModel):
    """What `maedistill evaluate` has written of a network, or of one of its exits, which then has a name."""

    name: Annotated[str, Field(max_length=4096)] = ""  # of a network beside the exits: its path
    top1_correct: Annotated[int, Field(ge=0)]
    images: _Count
    fingerprint: Annotated[str, Field(min_length=12, max_length=200)]
    parameters: _Count
    precision: _Name
    device: _Name
    processor: _Name = ""  # earlier versions did not say it, and ARM does not
    latency_ms: _Measure | None = None
    images_per_second: _Measure | None = None
    file_bytes: _Count | None = None

    @model_validator(mode="after")
    def _is_a_share(self) -> "Scorecard":
        if self.top1_correct > self.images:
            raise ValueError("more images are classified correctly than there are")
        return self


@dataclass(frozen=True)
class Row:
    """A network that was scored. network: the same for all files of one."""

    name: str
    network: str
    file: Path
    megabytes: float
    score: Scorecard

    @property
    def top1(self) -> Interval:
        """Return top-1 with Wilson's interval."""
        return of_count(self.score.top1_correct, self.score.images)

    @property
    def machine(self) -> str:
        """Name processor and threads. A processor that is not recorded differs from that of every other row."""
        known = self.score.processor or not self.score.device.startswith("CPU")
        return ", ".join(filter(None, [self.score.processor, self.score.device, "" if known else f"of {self.name}"]))

    @property
    def data(self) -> str:
        """Name the images."""
        return f"{self.score.images:,} images, fingerprint {self.score.fingerprint[:12]}"

    def cells(self) -> list[str]:
        """Return the cells of a line of the table."""
        score, low, high = self.score, 100 * self.top1.low, 100 * self.top1.high
        latency = "-" if score.latency_ms is None else f"{score.latency_ms:.2f} ms"
        rate = "-" if score.images_per_second is None else f"{score.images_per_second:.0f}"
        cells = [self.name, percent(score.top1_correct, score.images), f"{low:.1f} to {high:.1f}"]
        cells += [f"{self.megabytes:.2f} MB", latency, rate, f"{score.parameters / 1e6:.2f} M"]
        return [*cells, score.precision, self.machine, self.data]


def read_rows(given: Sequence[str]) -> list[Row]:
    """Read all scorecards of runs, exports and files, each once. Raises DataError for an invalid one."""
    files: dict[str, Path] = {}
    for file in chain.from_iterable(map(_scorecards, given)):
        files.setdefault(os.path.realpath(file), file)
    places = [os.path.abspath(f.parent if f.name in (_OF_A_RUN, *_OF_FORMATS) else f) for f in files.values()]
    root = os.path.commonpath([os.path.dirname(place) for place in places])
    rows: dict[str, Row] = {}
    for file, place in zip(files.values(), places, strict=True):
        for row in _read(file, f"{os.path.relpath(place, root)} {_OF_FORMATS.get(file.name, '')}".strip()):
            names = (f"{row.name} ({i})" if i > 1 else row.name for i in count(1))
            name = next(name for name in names if name not in rows)
            rows[name] = replace(row, name=name)
    return list(rows.values())


def _scorecards(given: str) -> list[Path]:
    """Return those of a run and of the exports in it, of an export, or the file itself."""
    path = Path(os.path.expanduser(given))
    if os.path.isfile(path):  # Path.is_file raises errors of long names and of permissions
        return [path]
    if not os.path.isdir(path):
        raise DataError(f"there is no {given}", f"write one: {_WRITE}")
    exports = sorted(one for one in chain(path.glob("export"), path.glob("export_*")) if one.suffix != ".tmp")
    files = [folder / name for folder in (path, *exports) for name in (_OF_A_RUN, *_OF_FORMATS)]
    if not (found := [file for file in files if os.path.isfile(file)]):
        raise DataError(f"{given} holds no scorecard of accuracy and latency", f"write one: {_WRITE}")
    return found


def _read(file: Path, name: str) -> list[Row]:
    """Return the rows of a scorecard: one, or those of all exits. name: of the network."""
    kind, size, network = _OF_FORMATS.get(file.name), 0, os.path.realpath(file)
    try:
        entries = read_json(file)
        parts = [json.dumps(entries | part) for part in entries.get("exits") or [{}]]
        scores = list(map(Scorecard.model_validate_json, parts))
        if kind and (beside := file.with_name(RECORD)).is_file():  # the file may have been copied alone
            whole = list(map(read_json(beside).get, ("network", "peer", "weights")))
            network = json.dumps(whole) if whole[0] else os.path.realpath(file.parent)
            size = weights.stat().st_size if (weights := file.with_name(_WEIGHTS[kind])).is_file() else 0
    except (CorruptCheckpoint, ValidationError, TypeError, OSError) as error:
        problem = first_problem(error) if isinstance(error, ValidationError) else str(error)
        raise DataError(f"{file} is not a scorecard: {problem}", f"write it again: {_WRITE}") from None
    names, rows = [score.name for score in scores], []
    own = names.index("end") + 1 if "end" in names else 1  # the others stand beside the exits
    for i, score in enumerate(scores):
        megabytes = (size or score.file_bytes or 4 * score.parameters) / 1e6
        joined = network if i < own else f"{network} {score.name}"
        rows.append(Row(f"{name} {score.name}".strip(), joined, file, megabytes, score))
    return rows


def write_page(rows: Sequence[Row], out: Path, *, command: str) -> Path:
    """Write OUT/comparison.md, comparison.json and, with matplotlib, comparison.png. Raises DataError if it cannot."""
    with write_errors(out):
        make_folder(out)
        with tempfile.TemporaryDirectory() as folder:
            chart = latency_chart(_drawn(rows), Path(folder, _PICTURE), order=[row.name for row in rows])
            if chart is not None:
                write_durably(out / _PICTURE, chart.read_bytes())
            else:  # an earlier one is of other rows
                (out / _PICTURE).unlink(missing_ok=True)
    lines = ["# Size, accuracy and latency", ""]
    lines += [f"![size, accuracy and latency]({_PICTURE})", ""] if chart else []
    lines += [*markdown_table(HEADS, [row.cells() for row in rows]), ""]
    lines += [line for note in notes(rows) for line in (markdown(note), "")]
    result = []
    for row in rows:
        own = {"name": row.name, "network": row.network, "file": str(row.file), "megabytes": row.megabytes}
        result.append(row.score.model_dump() | own)
    text = json.dumps({"command": command, "rows": result}, indent=1, allow_nan=False)
    write_text(out / "comparison.json", f"{text}\n")
    write_text(out / "comparison.md", "\n".join([*lines, f"Command: {code(command)}", ""]))
    return out / "comparison.md"


def _drawn(rows: Sequence[Row]) -> dict[str, Timed]:
    """Return the discs of the picture: of rows with a latency, in the first panels."""
    discs = {}
    for row in rows:
        if (latency := row.score.latency_ms) is not None:
            discs[row.name] = Timed(row.top1, row.megabytes, latency, row.network, (row.machine, row.data))
    panels = list(dict.fromkeys(disc.panel for disc in discs.values()))[:_PANELS]
    return {name: disc for name, disc in discs.items() if disc.panel in panels}


def notes(rows: Sequence[Row]) -> list[str]:
    """Return what a reader of the table must know: which rows can be compared, and what the columns are."""
    texts, drawn, timed = [], _drawn(rows), [row for row in rows if row.score.latency_ms is not None]
    if len({row.machine for row in timed}) > 1:
        texts.append("Not all latencies compare: the processors or their threads differ, or are not recorded.")
    if len({row.data for row in rows}) > 1:
        texts.append("Not all accuracies compare: they are of different images.")
    if left := [row.name for row in rows if row.name not in drawn]:
        texts.append(f"Without latency, or after {_PANELS} panels, hence not in the picture: {join_first(left)}.")
    return [
        *texts,
        "Intervals: 95 %, Wilson's, of the images. Latency: median of one image; images/s in batches. Size: of the "
        "file of the weights, or where none is known 4 bytes for each parameter. In the picture the area of a disc is "
        "proportional to it, a line joins formats and exits of one checkpoint, and only discs of one panel compare.",
    ]
