"""What the witness of each start noted, held against the uninterrupted run; and the files that a run leaves.

    Notes(reference run).check(start) after each start; same_result(run, reference run) after the last

A note is one micro-batch of one rank: positions, and for each of them the sample, checksums of its crop and of the
image as the network reads it, and its patch order or its target.
"""

import json
import re
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tests.support.launch import Finished, Start

BATCH = 12  # samples of a step, all ranks together
WEIGHTS = ("model.safetensors", "optimizer.safetensors", "ema.safetensors")
TIMES = {"images_per_second", "data_wait", "memory_gb", "eta_seconds", "trained_seconds"}
Note = dict[str, Any]


class Notes:
    """What a finished run was given by position, and which steps the starts under test did so far."""

    def __init__(self, reference: Path) -> None:
        self.given = {position: given for note in _read(reference) for position, *given in _rows(note)}
        self.next_step = 0  # the first that no start has done yet

    def check(self, start: Start) -> range:
        """Check what the witness noted of a start, and take the notes away; return the steps that it did or began.

        Each step is the uninterrupted run's, sample for sample, from the step on that the start said, none left out;
        a last step may be cut short where the start was killed.
        """
        steps: dict[int, list[int]] = {}
        for note in _read(start.run):
            for position, *given in _rows(note):
                assert given == self.given[position], f"position {position} is given other pixels, masks or targets"
                steps.setdefault(position // BATCH, []).append(position)
        for file in start.run.glob("witness-*.jsonl"):
            file.unlink()
        if not steps:
            return range(0)
        said = re.search(r"continues at step (\d+)", start.printed())
        first, last = int(said[1]) if said else 0, max(steps)
        assert sorted(steps) == list(range(first, last + 1)), f"starts at step {first}, does {sorted(steps)}"
        assert first <= self.next_step, f"step {self.next_step} is left out"
        for step, positions in steps.items():
            whole = list(range(BATCH * step, BATCH * (step + 1)))
            assert sorted(positions) == whole or (step == last and set(positions) < set(whole)), f"step {step}"
        self.next_step = max(self.next_step, last + (len(steps[last]) == BATCH))
        return range(first, last + 1)


def same_result(run: Path, reference: Path) -> None:
    """Check that two runs ended with the same bytes and the same losses, and that nothing temporary is left."""
    ours, theirs = (max((folder / "checkpoints").glob("step_?????????")) for folder in (run, reference))
    assert ours.name == theirs.name, f"{ours.name} is not {theirs.name}"
    names = sorted(path.name for path in theirs.glob("*.safetensors"))
    assert set(WEIGHTS) <= set(names)
    for name in names:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), f"{name} differs"
    for mine, other in zip(losses(run), losses(reference), strict=True):
        assert mine == other, f"metrics differ: {mine} is not {other}"
    assert not (strays := list(run.rglob("*.tmp"))), f"left behind: {strays}"
    assert json.loads((run / "exit.json").read_text())["exit_code"] == 0, "exit.json does not say that it finished"


def losses(run: Path) -> list[dict[str, float]]:
    """Return everything that metrics.jsonl records but times, in order; check that each step is there once."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    records = [{name: value for name, value in line.items() if name not in TIMES} for line in lines]
    steps = [record["step"] for record in records if "loss" in record]
    assert steps == list(range(1, len(steps) + 1)), f"losses of steps {steps}"
    return records


def witnessed(run: Path, *columns: str) -> dict[int, tuple]:
    """Return what the witness noted of a finished run under these names, by position. All ranks together."""
    seen: dict[int, tuple] = {}
    for file in sorted(run.glob("witness-*.jsonl")):
        for note in map(json.loads, file.read_text().splitlines()):
            for position, *given in zip(note["positions"], *(note[name] for name in columns), strict=True):
                assert position not in seen, "a position is trained on twice"
                seen[position] = tuple(given)
    return seen


def logged(run: Path) -> int:
    """Return how many lines metrics.jsonl has so far."""
    file = run / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def weights(finished: Finished) -> dict[str, bytes]:
    """Return the tensors of the newest checkpoint as bytes."""
    tensors = load_file(finished.last_checkpoint() / "model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def _read(run: Path) -> list[Note]:
    """All notes of all ranks; a last line that a kill tore is left out."""
    lines = [line for file in run.glob("witness-*.jsonl") for line in file.read_text().splitlines(keepends=True)]
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _rows(note: Note) -> zip:
    """(position, what the network was given there), for each sample of a note."""
    columns = [column for name, column in sorted(note.items()) if name not in ("positions", "rates")]
    return zip(note["positions"], *columns, strict=True)
