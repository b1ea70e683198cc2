"""The whole of pre-training on two CPU cores: real digits -> shards -> teacher -> MAE, DMAE, AMD students -> a report.

    python tools/quickstart.py               everything, some minutes; started again, it skips what is done
    python tools/quickstart.py --epochs 2    a quick look

Every step is a command that works alone; it is printed before it runs.
"""

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

from maedistill.errors import exit_code_of
from maedistill.report import write_comparison

ROOT = Path(__file__).resolve().parent.parent
RUNS = ("teacher", "mae", "dmae", "amd")
NOTES = (
    "scikit-learn's 1,797 real digit scans at 32 px: 1,497 to train on, 300 for kNN. The students have one size and "
    "equal epochs; DMAE and AMD learn from the teacher of the first row. The pixel losses have one target and compare; "
    "the alignment losses of DMAE and AMD measure different things and do not.",
)


def main() -> None:
    """Runs each step as a command of its own and stops at the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=float, help="epochs of teacher and students, instead of their configs'")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder of the runs and the report")
    arguments = parser.parse_args()
    start, out = time.perf_counter(), arguments.out
    shards = out / "shards"
    settings = [f"data.train={shards}/train-*.tar", f"data.val={shards}/val-*.tar"]
    if arguments.epochs is not None:
        settings += [f"optim.epochs={arguments.epochs:g}", f"optim.warmup_epochs={arguments.epochs / 10:g}"]
    run_step("1/5 shards", ["tools/make_shards.py", "digits", str(shards)])
    for number, name in enumerate(RUNS, start=2):
        teacher = [f"teacher.source=run:{out}/teacher"] if name in ("dmae", "amd") else []
        command = ["tools/pretrain.py", f"configs/quickstart/{name}.yaml", f"run={out}/{name}", *teacher, *settings]
        run_step(f"{number}/5 {name}", command)
    title = "Quickstart: one student, three ways to pre-train it"
    report = write_comparison({name: out / name for name in RUNS}, out, title=title, notes=NOTES)
    print(f"\ndone in {(time.perf_counter() - start) / 60:.1f} minutes: open {report}")


def run_step(title: str, command: list[str]) -> None:
    """Prints `python COMMAND` and runs it; ends with its exit code where that is not 0."""
    print(f"\n== {title}\n$ python {shlex.join(command)}", flush=True)
    tool, *arguments = command
    code = subprocess.run([sys.executable, str(ROOT / tool), *_from_here(arguments)]).returncode
    if code:
        sys.exit(code)


def _from_here(arguments: list[str]) -> list[str]:
    """Config files are found beside this tool, from whichever folder it was started."""
    return [str(ROOT / text) if text.startswith("configs/") else text for text in arguments]


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
