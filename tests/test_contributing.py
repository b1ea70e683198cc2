"""CONTRIBUTING's steps lead to what exists, and they are enough: what they add works, in a copy of the package."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import CONFIG, FINETUNE_CONFIG
from tests.support.contributions import CONTRIBUTIONS, Edit
from tests.support.launch import ROOT

# The steps of each section by number, from 1; the text before the first one has the number 0.
SECTIONS = {
    title: dict(enumerate(re.split(r"^\d+\. ", body, flags=re.MULTILINE)))
    for title, body in re.findall(
        r"^## (Add [^\n]+)\n(.+?)(?=^## |\Z)", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL | re.MULTILINE
    )
}
STEPS = [
    pytest.param(section, step, id=f"{section} {number}")
    for section, steps in SECTIONS.items()
    for number, step in steps.items()
    if "`" in step
]
PACKAGE = "\n".join(file.read_text() for file in (ROOT / "maedistill").rglob("*.py"))
PLACEHOLDER = re.compile(r"NAME|KIND|FOLDER|\(\.\.\.\)|:")  # what the reader chooses

# Uses what the contributions add: a teacher from the new source, pre-training by the new method with the new key, its
# export, and fine-tuning with the new term.
USE = """
import sys
import numpy as np, timm
import maedistill
from maedistill.config.loader import load_config
from maedistill.config.pretrain import PretrainConfig

weights = timm.create_model("test_vit", num_classes=0).state_dict()
np.savez("teacher.npz", **{key: value.numpy() for key, value in weights.items()})
once = {"optim.epochs": 1, "optim.warmup_epochs": 0.5, "log.trackers": []}
method = {"method": "pooled", "align.student": [1], "align.teacher": [3], "log.knn_every_epochs": None}
method |= {"teacher.source": "numpy:test_vit,teacher.npz", "data.negatives": True}
run = maedistill.pretrain("pretrain.yaml", {**once, **method, "run": "student"})
steps = maedistill.read_metrics(run)
assert 0 < steps[-1]["align"] < steps[0]["align"] < 2 and steps[-1]["nonfinite"] == 0, steps
try:
    load_config("pretrain.yaml", ["method=amd", "data.negatives=true", "run=x"], root=PretrainConfig)
except maedistill.ConfigError as error:
    assert "data.negatives" in str(error)
else:
    sys.exit("the rule of data.negatives does not hold")
maedistill.export(run, "export")
assert "by the mean of its tokens" in open("export/README.md").read()
term = {"init.source": f"run:{run}", "distill.teachers": [f"run:{run}"], "distill.norms.weight": 1.0}
tuned = maedistill.finetune("finetune.yaml", {**once, **term, "run": "tuned"})
assert any(record.get("norms", 0) > 0 for record in maedistill.read_metrics(tuned)), maedistill.read_metrics(tuned)
assert load_config("example/pooled", ["run=x", "data.train=x.tar"], root=PretrainConfig).config.method == "pooled"
"""


def files_of(step: str) -> list[Path]:
    """The files and folders that a step names; it must find each of them."""
    paths = [token for token in re.findall(r"`([\w./]+)`", step) if "/" in token or token.endswith((".py", ".md"))]
    found = []
    for token in paths:
        if PLACEHOLDER.search(token):
            continue
        places = [*(ROOT / "maedistill").rglob(token), *ROOT.glob(token), *(ROOT / "docs").glob(token)]
        assert places, f"there is no {token}"
        found += places[:1]
    return found


def test_the_page_has_the_steps():
    assert SECTIONS.keys() == CONTRIBUTIONS.keys() and len(STEPS) > 25


@pytest.mark.parametrize(("section", "step"), STEPS)
def test_a_step_names_what_exists(section, step):
    files = files_of(step)
    names = [token for token in re.findall(r"`([^`]+)`", step) if re.fullmatch(r"[A-Za-z_][\w.]*(\(\))?", token)]
    names = [name.removesuffix("()") for name in names if not name.endswith((".py", ".md"))]
    texts = "\n".join(file.read_text() for file in files if file.suffix in (".py", ".md")) + PACKAGE
    for name in names:
        if not PLACEHOLDER.search(name):
            assert re.search(rf"\b{re.escape(name.rpartition('.')[2])}\b", texts), (section, name)


def contribute(tree: Path, section: str, edit: Edit) -> None:
    """Make one change in a copy of the checkout. It fails if the step of the page does not lead to the file."""
    step, file = SECTIONS[section][edit.step], tree / edit.file
    where = f"CONTRIBUTING, {section} {edit.step}"
    leads = (file.name, f"{file.parent.name}/", "configs/FOLDER/NAME.yaml" if file.suffix == ".yaml" else file.name)
    assert any(name in step for name in leads), f"{where} does not lead to {edit.file}"
    if edit.old:
        text = file.read_text()
        assert text.count(edit.old) == 1, f"{where}: {edit.file} has no single place {edit.old!r}"
        file.write_text(text.replace(edit.old, edit.new))
    else:
        assert not file.exists()
        file.parent.mkdir(exist_ok=True)
        file.write_text(edit.new)


def test_the_steps_are_enough(tmp_path, shards):
    for folder in ("maedistill", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for section, edits in CONTRIBUTIONS.items():
        for edit in edits:
            contribute(tmp_path, section, edit)
    (tmp_path / "pretrain.yaml").write_text(CONFIG.format(shards=shards))
    (tmp_path / "finetune.yaml").write_text(FINETUNE_CONFIG.format(shards=shards))
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    for command in (["-c", USE], ["-m", "maedistill", "hello"]):
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "hello\n"
