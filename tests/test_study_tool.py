"""tools/study.py in real processes on a tiny study: all of it, nothing twice, and on after a kill in the middle."""

import json
import signal
import time
from pathlib import Path

import pytest

from tests.support.launch import Launcher, Start

pytestmark = pytest.mark.faults  # the study of these tests is killed first

STUDY = """\
out: {out}
seeds: [0]
baseline: mae
teachers:
  early: {{config: mae.yaml, set: [student.depth=3, optim.epochs=0.5, optim.warmup_epochs=0], finetune: true}}
students:
  scratch: {{same_architecture_as: mae}}
  mae: {{config: mae.yaml}}
  dmae: {{config: dmae.yaml, set: ["teacher.source={{teacher.early}}"]}}
finetune: {{config: finetune.yaml}}
"""
DMAE = "extends: mae.yaml\nmethod: dmae\nteacher: {source: 'run:elsewhere'}\nalign: {student: [1], teacher: [2]}\n"
FINETUNE = """\
data: {image_size: 32, eval_crop: 1.0, workers: 0}
student: {drop_path: 0.0}
augment: {rand_augment: null, mixup: 0.0, cutmix: 0.0, erasing: 0.0}
optim: {epochs: 6, warmup_epochs: 0, global_batch: 12, lr: 1e-3}
engine: {micro_batch: 12}
log: {every_steps: 1, save_every_epochs: 0.5, trackers: []}
"""
STUDENTS = ("mae", "dmae")
STEPS = ["early/seed_0/pretrain", "scratch/seed_0/finetune"]
STEPS += [f"{name}/seed_0/{stage}" for name in STUDENTS for stage in ("pretrain", "finetune")]
STEPS += ["early/seed_0/finetune"]


class Tool:
    """tools/study.py on a study file of its own; the study is forked, its steps are new interpreters."""

    def __init__(self, launcher: Launcher, folder: Path, shards: Path, tiny: str) -> None:
        self.launcher, self.out, self.shards = launcher, folder / "out", shards
        (folder / "mae.yaml").write_text(f"{tiny}method: mae\n")
        (folder / "dmae.yaml").write_text(DMAE)
        (folder / "finetune.yaml").write_text(FINETUNE)
        (folder / "study.yaml").write_text(STUDY.format(out=self.out))
        data = [f"data.train={shards}/train-*.tar", f"data.val={shards}/val-*.tar"]
        self.words = ["tools/study.py", folder / "study.yaml", *data]

    def start(self, *arguments: str) -> Start:
        return self.launcher.start(self.out, [*self.words, *arguments], OMP_NUM_THREADS=1)

    def __call__(self, *arguments: str, code: int = 0) -> tuple[str, str]:
        """What it says, after it has ended with `code`."""
        ended = self.start(*arguments).finish(code, timeout=300)
        return ended.out, ended.err

    def finished(self) -> list[str]:
        ends = {step: self.out / step / "exit.json" for step in STEPS}
        return [step for step, end in ends.items() if end.exists() and json.loads(end.read_text())["exit_code"] == 0]


def records(run: Path) -> list[dict]:
    """A run's metrics."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def tool(launcher, shards, pretraining, tmp_path_factory) -> Tool:
    tiny = pretraining.config.read_text().replace("epochs: 3, warmup_epochs: 0.5", "epochs: 1, warmup_epochs: 0.5")
    return Tool(launcher, tmp_path_factory.mktemp("study"), shards, f"{tiny}run: unused\n")


@pytest.fixture(scope="module")
def made(tool) -> str:
    """What was said while the study was made: its fine-tuning of `mae` was stopped with it, and both started again."""
    first = tool.start("log.keep=3")
    metrics, limit = tool.out / "mae/seed_0/finetune/metrics.jsonl", time.monotonic() + 200
    while not (metrics.exists() and metrics.read_text().count("\n") > 1):
        assert not first.ended() and time.monotonic() < limit, first.printed()
        time.sleep(0.02)
    first.signal(signal.SIGTERM)
    assert first.wait() == [143]
    assert tool.finished() == STEPS[:3]
    assert json.loads((tool.out / "mae/seed_0/finetune/exit.json").read_text())["exit_code"] == 75
    return tool("log.keep=3", "--jobs", "2")[0]


def test_it_goes_on_where_it_was_killed_and_comes_to_the_end(tool, made):
    for step in STEPS[:3]:
        assert f"skips {step}: done" in made
    assert "continues at step" in (tool.out / "logs/mae_seed_0_finetune.log").read_text()
    assert tool.finished() == STEPS
    steps = [record["step"] for record in records(tool.out / "mae/seed_0/finetune") if "loss" in record]
    assert steps == list(range(1, 49))


def test_the_results_are_those_of_the_runs(tool, made):
    results = json.loads((tool.out / "results.json").read_text())
    networks = results["networks"]
    assert list(networks) == ["early", "scratch", *STUDENTS] and results["unfinished"] == []
    scores = {}
    for name in ("early", "scratch", *STUDENTS):
        score = [record for record in records(tool.out / name / "seed_0/finetune") if "top1" in record][-1]
        scores[name] = score["top1"]
        assert networks[name]["summary"]["each"] == {"0": scores[name]}
    for name in ("scratch", *STUDENTS[1:]):
        difference = networks[name]["summary"]["difference"]
        assert (difference["n"], difference["mean"], difference["sd"]) == (1, scores[name] - scores["mae"], None)
        assert difference["low"] < difference["mean"] < difference["high"]
    assert len({networks[name]["summary"]["parameters"] for name in ("scratch", *STUDENTS)}) == 1
    assert networks["early"]["summary"]["pretrain_epochs"] == 0.5
    page = (tool.out / "results.md").read_text()
    assert "| dmae | 1 |" in page and "Command: `maedistill study" in page


def test_started_again_it_does_nothing_and_other_settings_are_refused(tool, made):
    before = {path: path.stat().st_mtime_ns for step in STEPS for path in (tool.out / step).rglob("*")}
    out, _ = tool("log.keep=3")
    assert ": done in " not in out
    assert out.count("skips ") == len(STEPS)
    _, err = tool("optim.weight_decay=0.2", code=2)
    assert "optim.weight_decay: 0.05 there, 0.2 now" in err and "use another --out" in err and err.count("\n") == 2
    assert before == {path: path.stat().st_mtime_ns for step in STEPS for path in (tool.out / step).rglob("*")}


def test_a_test_set_is_scored(tool, made):
    """Here it is the validation set, so the counts are the same."""
    out, _ = tool("log.keep=3", "--only", "mae", "--test", f"{tool.shards}/val-*.tar")
    ended = [line.partition(": done in ")[0] for line in out.splitlines() if ": done in " in line]
    assert ended == ["3/3 mae/seed_0/finetune/test"]
    runs = json.loads((tool.out / "results.json").read_text())["networks"]["mae"]["runs"]["0"]
    assert runs["test"] == {key: runs["finetune"][key] for key in ("top1", "top1_correct", "top1_images")}


def test_what_is_there_can_be_compared_and_looked_at(tool, made):
    (tool.out / "results.md").unlink()
    tool("--report")
    page = (tool.out / "results.md").read_text()
    assert "| mae | 1 |" in page and "log.keep=3" in page and "--report" not in page
    out, _ = tool("--dry-run", "--seeds", "0", "1")
    states = dict(line.split(" ", 1)[1].split(": ") for line in out.splitlines() if ": " in line and line[0] != " ")
    assert all(states[step] == "done" for step in STEPS) and states["dmae/seed_1/finetune"] == "to do"
    assert not (tool.out / "dmae/seed_1").exists()
