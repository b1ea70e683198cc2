"""The whole way on two CPU cores, with real digits: shards, teacher, students, fine-tuning, export, comparison.

    maedistill quickstart               everything, some minutes; started again, it skips what is done
    maedistill quickstart --epochs 2    a quick look

Every step is a command that works alone; it is printed before it runs. The trainings are the study of
quickstart/study; two run at a time and write to OUT/logs.
"""

import argparse
import shlex
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imported by the functions: it takes seconds, which --help and mistakes need not wait for
    from maedistill.report.comparison import ComparedNetwork
    from maedistill.study.runner import Step
    from maedistill.study.schema import Study

SEED = 0
JOBS = 2  # concurrent training runs: each of these small networks gets half of the cores
TITLE = "Quickstart: one small student, four ways to begin with it"
NOTES = (
    "scikit-learn's 1,797 real digit scans at 32 px: pre-trained on 1,497 without labels, fine-tuned on a tenth of "
    "them with labels, evaluated on the other 300. A point of top-1 is three images, and there is one seed: "
    "differences of a few points say nothing about which way is best. The students are one network, pre-trained for "
    "equal epochs and fine-tuned alike; DMAE and AMD learn from the teacher, whose training is not in their time. "
    "Trainings ran two at a time.",
    "Pixel losses have one target and compare; the alignment losses of DMAE and AMD measure different things and "
    "do not.",
)


def main() -> None:
    """Run each step as a separate command; if a step fails, the steps that need it are not started."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="maedistill quickstart", description=__doc__, formatter_class=raw)
    parser.add_argument("--epochs", type=float, help="epochs of every training, instead of the configs'")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder of the runs and the report")
    arguments = parser.parse_args(sys.argv[2:])

    from maedistill.report.comparison import write_comparison
    from maedistill.study.file import load_study
    from maedistill.study.plan import StudyPlan
    from maedistill.study.results import collect
    from maedistill.study.results_page import write_results
    from maedistill.study.runner import Step, run_steps

    start, out = time.perf_counter(), arguments.out
    shards, val = out / "shards", f"{out}/shards/val-*.tar"
    settings = [f"data.train={shards}/train-*.tar", f"data.val={val}"]
    if arguments.epochs is not None:
        settings += [f"optim.epochs={arguments.epochs:g}", f"optim.warmup_epochs={arguments.epochs / 10:g}"]
    written = (shards / "make_shards.json").is_file
    run_steps([Step("shards", ("shards", "digits", str(shards)), done=written)], out=out)
    study = load_study("quickstart/study")
    networks = networks_of(study, out)
    trainings = StudyPlan(study, out, [SEED], settings=settings).steps()
    run_steps([*trainings, *export_steps(networks, out)], out=out, jobs=JOBS)
    run_steps(score_steps(networks, out, val), out=out)  # one at a time, because latency is measured
    command = shlex.join(sys.argv)
    write_results(collect(study, out, [SEED]), out, title=TITLE, command=command)
    report = write_comparison(networks, out, title=TITLE, notes=[*NOTES, f"Command: `{command}`"])
    print(f"\ndone in {(time.perf_counter() - start) / 60:.1f} minutes: open {report}")


def networks_of(study: "Study", out: Path) -> "dict[str, ComparedNetwork]":
    """Return the folders of every compared network, the teacher first."""
    from maedistill.report.comparison import ComparedNetwork

    networks = {}
    for name, network in (study.teachers | study.students).items():
        pretrain, finetune = network.steps(name, SEED)
        assert finetune is not None  # the study fine-tunes every network
        run = out / finetune
        before = out / pretrain if pretrain is not None else None
        networks[name] = ComparedNetwork(before, run, run / "export", run / "scorecard.json")
    return networks


def export_steps(networks: "dict[str, ComparedNetwork]", out: Path) -> "list[Step]":
    """Return the steps that export each network as a timm model to its run's folder."""
    from maedistill.study.runner import Step

    return [
        Step(
            f"{name}/export",
            ("export", str(network.finetune)),
            needs=(str(network.finetune.relative_to(out)),),
            done=(network.export / "export.json").is_file,
        )
        for name, network in networks.items()
    ]


def score_steps(networks: "dict[str, ComparedNetwork]", out: Path, shards: str) -> "list[Step]":
    """Return the steps that measure accuracy and latency of each export."""
    from maedistill.study.completion import is_scored
    from maedistill.study.runner import Step

    return [
        Step(
            f"{name}/score",
            ("evaluate", str(network.export), shards, "--json", str(network.score)),
            done=partial(is_scored, network.score, shards),
        )
        for name, network in networks.items()
    ]
