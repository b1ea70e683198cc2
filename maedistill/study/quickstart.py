"""The quickstart: the study of quickstart/study on real digits, its exports and scores, and one comparison.

`commands/quickstart.py` reads the command line. Every step is a command that works alone, see `runner.py`.
"""

import shlex
import sys
import time
from pathlib import Path

from maedistill.escaping import code, masked, say
from maedistill.report.comparison import (
    PREDICTIONS,
    ComparedNetwork,
    headline,
    read_results,
    text_table,
    write_comparison,
)
from maedistill.report.interactive import has_bokeh
from maedistill.report.run_page import refresh
from maedistill.study.completion import is_scored
from maedistill.study.file import load_study
from maedistill.study.plan import StudyPlan
from maedistill.study.results import collect
from maedistill.study.results_page import write_results
from maedistill.study.runner import Step, run_steps
from maedistill.study.schema import Study
from maedistill.study.study_page import PAGE, write_study_page

SEED = 0
JOBS = 2  # concurrent training runs: each of these small networks gets half of the cores
STUDENT, TEACHER, BASELINE = "dmae", "teacher", "scratch"  # of the headline
TITLE = "Quickstart: one small student, three ways to begin with it"
NOTES = (
    "scikit-learn's 1,797 real digit scans at 32 px: pre-trained on 1,000 without labels, fine-tuned on 31 of them "
    "(three or four of each class) with labels, evaluated on the other 797. There is one seed. The students are one "
    "network, pre-trained for equal epochs and fine-tuned alike; DMAE learns from the teacher, whose training is not "
    "in its time. Trainings ran two at a time.",
    "Pixel losses have one target and compare; the alignment loss of DMAE is not part of them.",
)


def run_quickstart(out: Path, *, epochs: float | None) -> None:
    """Run each step as a separate command; if a step fails, the steps that need it are not started.

    out: folder of the runs and the report. epochs: of every training, instead of the configs'.
    """
    start = time.perf_counter()
    shards, val = out / "shards", f"{out}/shards/val-*.tar"
    settings = [f"data.train={shards}/train-*.tar", f"data.val={val}"]
    if epochs is not None:
        settings += [f"optim.epochs={epochs:g}", f"optim.warmup_epochs={epochs / 10:g}"]
    written = (shards / "make_shards.json").is_file
    run_steps([Step("shards", ("shards", "digits", str(shards)), done=written)], out=out)
    study = load_study("quickstart/study")
    networks = networks_of(study, out)
    trainings = StudyPlan(study, out, [SEED], settings=settings).steps()
    run_steps([*trainings, *export_steps(networks, out)], out=out, jobs=JOBS)
    timed = timed_networks(networks)
    run_steps(score_steps({name: n for name, n in networks.items() if name not in timed}, val), out=out, jobs=JOBS)
    run_steps(score_steps(timed, val, latency=True), out=out)  # one at a time, because latency is measured
    command, page = masked(shlex.join(sys.argv)), out / PAGE
    write_results(collect(study, out, [SEED]), out, title=TITLE, command=command)
    results = read_results(networks, baseline=BASELINE)
    notes = [f"**{headline(results, student=STUDENT, teacher=TEACHER, baseline=BASELINE)}.**", *NOTES]
    report = write_comparison(
        networks, results, out, title=TITLE, baseline=BASELINE, notes=[*notes, f"Command: {code(command)}"]
    )
    refresh(page, lambda: write_study_page(out, page), create=has_bokeh())
    say("", *text_table(results, baseline=BASELINE), "")
    say(headline(results, student=STUDENT, teacher=TEACHER, baseline=BASELINE))
    say(f"done in {(time.perf_counter() - start) / 60:.1f} minutes: open {page if page.is_file() else report}")
    runs = shlex.join(str(network.finetune) for network in timed_networks(networks).values())
    say(f"your own beside these, by size, accuracy and latency: maedistill compare {runs} RUN")


def networks_of(study: Study, out: Path) -> dict[str, ComparedNetwork]:
    """Return the folders of every compared network, the teacher first."""
    networks = {}
    for name, network in (study.teachers | study.students).items():
        pretrain, finetune = network.steps(name, SEED)
        assert finetune is not None  # the study fine-tunes every network
        run = out / finetune
        before = out / pretrain if pretrain is not None else None
        networks[name] = ComparedNetwork(before, run, run / "export", run / "scorecard.json")
    return networks


def export_steps(networks: dict[str, ComparedNetwork], out: Path) -> list[Step]:
    """Return the steps that export each network as a timm model to its run's folder."""
    return [
        Step(
            f"{name}/export",
            ("export", str(network.finetune)),
            needs=(str(network.finetune.relative_to(out)),),
            done=(network.export / "export.json").is_file,
        )
        for name, network in networks.items()
    ]


def timed_networks(networks: dict[str, ComparedNetwork]) -> dict[str, ComparedNetwork]:
    """Return the first network of each architecture: the others share its latency."""
    first: dict[str, str] = {}
    for name, network in networks.items():
        first.setdefault(network.architecture, name)
    return {name: networks[name] for name in first.values()}


def score_steps(networks: dict[str, ComparedNetwork], shards: str, *, latency: bool = False) -> list[Step]:
    """Return the steps that measure accuracy, and latency if asked for, of each export."""
    steps = []
    for name, network in networks.items():
        predictions = network.finetune / PREDICTIONS
        files = ("--json", str(network.score), "--predictions", str(predictions))
        command = ("evaluate", str(network.export), shards, *files, *(() if latency else ("--no-latency",)))

        def done(network: ComparedNetwork = network, predictions: Path = predictions) -> bool:
            return is_scored(network.score, shards) and predictions.is_file()

        steps.append(Step(f"{name}/score", command, done=done))
    return steps
