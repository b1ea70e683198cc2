"""What a run has recorded, finished or under way; format seconds and bytes. Nothing heavy is imported."""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from maedistill.errors import DataError

# What records hold beside losses; no loss may have such a name.
RESERVED = frozenset({"step", "epoch", "lr", "grad_norm", "images_per_second", "data_wait", "memory_gb", "nonfinite"})
RESERVED |= {"eta_seconds", "trained_seconds", "target_std", "knn", "linear", "images", "bad_images"}
_METHODS = "maedistill.methods."
FINISHED = "finished"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read all complete lines of a run's metrics.jsonl, without a last line that a kill truncated.

    Raises DataError for a file that is not a run's metrics.
    """
    path, records = folder / "metrics.jsonl", []
    for _, record in metric_lines(path):
        if record is None:
            raise DataError(
                f"{path} cannot be read (not all lines say their step)",
                "start the run's command again, which leaves such lines out, or restore it from a copy",
            )
        records.append(record)
    return records


def has_losses(folder: Path) -> bool:
    """Return whether a run's records have a step to report. A finished run that lost its metrics.jsonl has none."""
    return any(record.get("loss") is not None for record in read_metrics(folder))


def last_end(folder: Path) -> str | None:
    """Return why the last start ended: FINISHED or an error; None if it is running, was killed or never was.

    A file that a power cut emptied says as little as none.
    """
    with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        return str(json.loads((folder / "exit.json").read_text())["reason"])
    return None


def metric_lines(path: Path) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Yield each complete line and its record, None if it has none; one at a time because a long run has many."""
    text = path.read_text(errors="replace") if path.exists() else ""
    for line in text.splitlines(keepends=True):
        if line.endswith("}\n"):
            record: Any = None
            with suppress(ValueError, RecursionError):
                record = json.loads(line)
            yield line, record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def method_call(metadata: Mapping[str, Any]) -> str:
    """Return the class of a run's method as run.json names it, with the arguments that the caller gave it."""
    arguments = ", ".join(f"{name}={value}" for name, value in (metadata.get("method_arguments") or {}).items())
    return f"{metadata['method_class']}({arguments})" if arguments else f"{metadata['method_class']}"


def own_method(metadata: Mapping[str, Any]) -> str | None:
    """Return `method_call` of a method that a caller brought; None for those of this package, and without a record."""
    is_ours = str(metadata.get("method_class") or _METHODS).startswith(_METHODS)
    return None if is_ours else method_call(metadata)


def duration(seconds: float) -> str:
    """Format seconds as `8h51m`, `12m04s` or `37s`."""
    seconds = round(seconds)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds % 60:02d}s" if minutes else f"{seconds}s"


def size_text(count: float) -> str:
    """Format a number of bytes as `2.56 GB`, `450 MB` or `0.58 kB`."""
    unit, scale = ("GB", 1e9) if count >= 1e9 else ("MB", 1e6) if count >= 1e6 else ("kB", 1e3)
    return f"{count / scale:{'.0f' if count >= 100 * scale else '.2f' if count < 10 * scale else '.1f'}} {unit}"
