"""The results of a check as files: results.json for a program, summary.md for a person."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from gpu_parts.rows import FAIL, Row, markdown
from gpu_parts.runner import PartEnd
from maedistill.durable import write_durably

TINY = "Tiny stand-ins for the networks: the verdicts count, the figures mean nothing."


def write_results(
    out: Path,
    head: dict[str, str],
    rows: Sequence[Row],
    ends: Sequence[PartEnd],
    *,
    command: str,
    seconds: float,
    tiny: bool,
) -> None:
    """Write both files, each as a whole. tiny: the networks are small stand-ins, so the figures have no meaning."""
    document = {
        "head": head,
        "tiny": tiny,
        "command": command,
        "seconds": seconds,
        "failed": sum(row.verdict == FAIL for row in rows),
        "parts": [asdict(end) for end in ends],
        "rows": [asdict(row) for row in rows],
    }
    write_durably(out / "results.json", (json.dumps(document, indent=1) + "\n").encode())
    lines = [
        "# GPU check",
        "",
        *(f"- {name}: {value}" for name, value in head.items()),
        f"- command: `{command}`",
        "",
        *([f"**{TINY}**", ""] if tiny else []),
        summary(rows, seconds=seconds),
        "",
        markdown(rows),
        "",
        "Seconds by part: " + ", ".join(f"{end.name} {end.seconds:.0f}" for end in ends),
    ]
    write_durably(out / "summary.md", ("\n".join(lines) + "\n").encode())


def not_run(ends: Sequence[PartEnd]) -> str | None:
    """Return text that lists the parts for which no time was left, or None."""
    left_out = [end.name for end in ends if end.code is None and end.seconds == 0]
    return f"no time was left for some parts; run them with --only {','.join(left_out)}" if left_out else None


def summary(rows: Sequence[Row], *, seconds: float) -> str:
    """Return one line with the number of rows by verdict."""
    counts = {name: sum(row.verdict == name for row in rows) for name in ("ok", FAIL, "measured", "skipped")}
    return ", ".join(f"{count} {name}" for name, count in counts.items()) + f", in {seconds:.0f} s"
