"""The whole of pre-training on two CPU cores: real digits -> shards -> teacher -> MAE, DMAE, AMD students -> a report.

    python tools/quickstart.py            everything, some minutes; started again, it skips what is done
    python tools/quickstart.py --epochs 2 a quick look

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

RUNS = Path("runs/quickstart")
STUDENTS = ("mae", "dmae", "amd")
NOTES = (
    "scikit-learn's 1,797 real digit scans at 32 px: 1,497 to train on, 300 for kNN. The students have one size and "
    "equal epochs; DMAE and AMD learn from the teacher of the first row. Pixel losses compare where targets are the "
    "same, which these are; alignment losses compare within a method only.",
)


def main() -> None:
    """Runs each step as a command of its own and stops at the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=float, help="epochs of teacher and students, instead of their configs'")
    arguments = parser.parse_args()
    shorter = []
    if arguments.epochs is not None:
        shorter = [f"optim.epochs={arguments.epochs:g}", f"optim.warmup_epochs={arguments.epochs / 10:g}"]
    start = time.perf_counter()
    step("1/5 shards", ["tools/make_shards.py", "digits", "shards/digits"])
    step("2/5 teacher", ["tools/pretrain.py", "configs/quickstart/teacher.yaml", *shorter])
    for number, method in enumerate(STUDENTS, start=3):
        step(f"{number}/5 {method}", ["tools/pretrain.py", f"configs/quickstart/{method}.yaml", *shorter])
    folders = {name: RUNS / name for name in ("teacher", *STUDENTS)}
    report = write_comparison(folders, RUNS, title="Quickstart: one student, three ways to pre-train it", notes=NOTES)
    print(f"\ndone in {(time.perf_counter() - start) / 60:.1f} minutes: open {report}")


def step(title: str, command: list[str]) -> None:
    """Prints and runs `python COMMAND`; ends with its exit code where that is not 0."""
    print(f"\n== {title}\n$ python {shlex.join(command)}", flush=True)
    code = subprocess.run([sys.executable, *command]).returncode
    if code:
        sys.exit(code)


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
