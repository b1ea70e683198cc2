"""Check maedistill on one GPU in a few minutes: whether it is right there, and how fast.

    python tools/gpu_check.py                      as much as fits in 9 minutes, what matters most first
    python tools/gpu_check.py --only speed,loader  some parts
    python tools/gpu_check.py --tiny               the check itself, on small sizes; runs without a GPU, too

Run it in a checkout; it needs no network, and maedistill need not be installed. A part that fails or hangs does not
stop the next one. OUT gets results.json, summary.md, rows.jsonl and logs.txt, written as the parts go on, so that a
SIGTERM loses nothing that was known; the last lines printed are the digest. The exit code is 1 if any check failed.
What finds no time is skipped and fails nothing. Speeds are figures, with their goals beside them: a goal that is missed
fails nothing.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from gpu_parts.rows import FAIL, SKIPPED, Row, RowFile, digest
from gpu_parts.runner import LOGS, TOOL, Child, Part, PartEnd, Settings, run_parts

from maedistill.errors import ConfigError, exit_code_of

# In order of importance: each method's results, then the speed of each network, then the rest, of which what is not
# timed runs side by side. Bounds are in seconds and include process start.
PARTS = [
    Part("methods", "gpu_parts.methods", 90, "loss and gradient of each method against the CPU", together=True),
    Part("peaks", "gpu_parts.peaks", 60, "what the card can do: products of matrices, copies"),
    Part("speed", "gpu_parts.speed", 200, "DMAE ViT-L -> ViT-B, light decoder: eager, compiled, and published loops"),
    Part("speed-published", "gpu_parts.speed", 200, "DMAE ViT-L -> ViT-B, published decoder"),
    Part("speed-amd", "gpu_parts.speed", 200, "AMD ViT-L -> ViT-B"),
    Part("speed-small", "gpu_parts.speed", 170, "DMAE ViT-B -> ViT-S, published decoder"),
    Part("tests", "gpu_parts.card_tests", 90, "tests/test_gpu.py"),
    Part("engine", "gpu_parts.engine", 120, "ZeRO 0 to 3, number formats, accumulation against torch", together=True),
    Part("prefetch", "gpu_parts.prefetch", 60, "batches copied ahead: the right ones, none too early", together=True),
    Part("host_waits", "gpu_parts.host_waits", 90, "no step waits for the card", together=True),
    Part("runs", "gpu_parts.runs", 200, "whole tiny runs against the CPU's, stopped and continued", together=True),
    Part("loader", "gpu_parts.loader", 180, "the loader alone, and a run that it feeds"),
    Part("details", "gpu_parts.speed", 240, "more on `speed`: batch sizes, kernels, cost of engine and compilation"),
]
MINUTES = 9.0
_MANY_CORES = 8  # with at least this many cores, parts that are not timed run at the same time

# Packages that maedistill imports, directly or through DeepSpeed and timm, and those of tests/conftest.py.
NEEDED = ["torch", "torchvision", "timm", "deepspeed", "webdataset", "pydantic", "einops", "yaml", "numpy", "PIL"]
NEEDED += ["safetensors", "huggingface_hub", "fsspec", "tqdm", "psutil", "msgpack", "hjson", "packaging", "pytest"]
NEEDED += ["hypothesis", "filelock"]

PACKING = """for a machine without network that has torch and torchvision, and what usually comes beside them:
  python tools/gpu_check.py --pack packed --python 3.12
collects in packed/ what such a machine lacks, for its Python, and prints the command to run there.
"""


def main() -> list[Row]:
    """Run the tool as the command line says; return the rows that failed."""
    arguments = parse_arguments()
    if arguments.list:
        print(parts_text())
        return []
    if arguments.pack:
        from gpu_parts.pack import pack

        print(pack(arguments.pack, python=arguments.python))
        return []
    parts = chosen(arguments.only)
    require_packages()
    require_card(arguments.tiny)
    rows = check(parts, out=arguments.out.resolve(), minutes=arguments.minutes, tiny=arguments.tiny)
    if all(row.verdict == SKIPPED for row in rows):
        raise ConfigError("nothing was checked", "allow more --minutes, or choose other parts with --only")
    return [row for row in rows if row.verdict == FAIL]


def check(parts: list[Part], *, out: Path, minutes: float, tiny: bool) -> list[Row]:
    """Run the parts, print and write their results; return all rows."""
    from gpu_parts.head import head
    from gpu_parts.results import TINY, not_run, summary, write_results

    start, machine = time.time(), head()
    out.mkdir(parents=True, exist_ok=True)
    for name in ("rows.jsonl", LOGS):
        (out / name).unlink(missing_ok=True)
    print("\n".join(f"{name}: {value}" for name, value in machine.items()), flush=True)
    cores, order, ends = int(machine["cores"]), [part.name for part in parts], list[PartEnd]()
    work = Path(tempfile.mkdtemp(prefix="maedistill-gpu-"))
    jobs = cores // 2 if cores >= _MANY_CORES else 1
    if tiny:
        jobs = max(jobs, min(cores, 2))
    until = start + 60 * minutes

    def written() -> list[Row]:
        """Write what is known so far; return its rows."""
        rows = sorted(RowFile(out / "rows.jsonl").all(), key=lambda row: order.index(row.part))
        command, seconds = shlex.join(["python", *sys.argv]), time.time() - start
        write_results(out, machine, rows, ends, command=command, seconds=seconds, tiny=tiny)
        return rows

    def progress(new: list[Row]) -> None:
        print("\n".join(map(str, new)), flush=True)
        written()

    try:
        settings = Settings(tiny, out, work, until, jobs, environment(work, cores=cores))
        run_parts(parts, settings, ends, progress=progress)
    finally:
        rows = written()
        notes = [note for note in (TINY if tiny else None, not_run(ends)) if note]
        ended = f"{summary(rows, seconds=time.time() - start)}: {out / 'summary.md'}"
        print("\n".join(["", digest(rows), *notes, ended]), flush=True)
        shutil.rmtree(work, ignore_errors=True)
    return rows


def _stop(number: int, frame: object) -> None:
    """End the parts, write the results and leave; further signals do not disturb that."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


def environment(work: Path, *, cores: int) -> dict[str, str]:
    """Return the environment of all processes: few threads each, and a common cache for torch.compile."""
    ours = {
        "OMP_NUM_THREADS": "1" if cores < _MANY_CORES else "2",
        "OMP_WAIT_POLICY": "PASSIVE",
        "TORCHINDUCTOR_CACHE_DIR": str(work / "compiled"),
        "TRITON_CACHE_DIR": str(work / "triton"),
    }
    path = filter(None, (str(TOOL.parent.parent), os.environ.get("PYTHONPATH")))  # for the tools that parts start
    return ours | os.environ | {"PYTHONPATH": os.pathsep.join(path)}


def chosen(only: str | None) -> list[Part]:
    """Select parts by name, in the order of the table."""
    names = [name for name in (only or "").split(",") if name]
    unknown = [name for name in names if name not in {part.name for part in PARTS}]
    if unknown:
        known = ", ".join(part.name for part in PARTS)
        raise ConfigError(f"--only: there is no part {', '.join(unknown)}", f"choose among {known}")
    return [part for part in PARTS if not names or part.name in names]


def require_packages() -> None:
    """Raise ConfigError if required packages are missing, because every part would fail."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ConfigError(f"not installed here: {', '.join(missing)}", "install them; --pack collects some of them")


def require_card(tiny: bool) -> None:
    """Raise ConfigError if there is no GPU, unless `tiny`, because nothing would be measured."""
    import torch

    if not tiny and not torch.cuda.is_available():
        raise ConfigError(
            f"torch {torch.__version__} finds no GPU here",
            "run this on a machine with one, or with --tiny, which tries the check itself on a CPU",
        )


def parts_text() -> str:
    """List the parts with their bounds."""
    width = max(len(part.name) for part in PARTS)
    lines = [f"  {part.name:<{width}}  {part.seconds:4.0f} s at most  {part.about}" for part in PARTS]
    note = f"in this order, as far as they fit into {MINUTES:g} minutes (--minutes); untimed ones run side by side"
    return "\n".join(["parts:", *lines, note])


def parse_arguments() -> argparse.Namespace:
    """Read the command line. In the process of a part, which is started with --child, this function never returns."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=f"{parts_text()}\n\n{PACKING}", formatter_class=raw)
    out = Path(os.environ.get("OUT") or "gpu_check")
    parser.add_argument("--out", type=Path, default=out, help="folder of the results (default: $OUT, or ./gpu_check)")
    parser.add_argument("--minutes", type=positive, default=MINUTES, help="for all of it (default %(default)g)")
    parser.add_argument("--only", metavar="PART,...", help="these parts alone")
    parser.add_argument("--tiny", action="store_true", help="small sizes: to try the check itself")
    parser.add_argument("--list", action="store_true", help="list the parts and stop")
    parser.add_argument("--pack", type=Path, metavar="DIR", help="collect there what a bare machine lacks, and stop")
    parser.add_argument("--python", default="3.12", metavar="X.Y", help="that machine's Python (default %(default)s)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        from gpu_parts.child import run_child

        run_child(Child(**json.loads(arguments.child)))
    return arguments


def positive(text: str) -> float:
    """Read a number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number above 0")
    return number


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    failed: list[Row] = []
    code = exit_code_of(lambda: failed.extend(main()))
    sys.exit(code or int(bool(failed)))
