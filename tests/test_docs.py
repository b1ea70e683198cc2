"""README and docs: every command line in them is one that the commands take, and every link leads somewhere."""

import re
import shlex
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from maedistill import cli
from maedistill.config.document import CONFIGS, find_config
from maedistill.config.loader import load_config
from maedistill.config.values import STAGES
from maedistill.study.file import load_study
from tests.support.launch import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LAUNCHER = re.compile(
    r"(?:\w+=\S+ )*(?:torchrun .*?-m |srun .*?|deepspeed .*?tools/|\.venv/bin/)?(maedistill|pretrain\.py)\b(.*)"
)
OWN = {"CONFIG", "FILE", "my_student.yaml"}  # stand for a config or study of the reader


def commands(page: Path) -> list[list[str]]:
    """The command lines of a page's bash blocks, without the launcher: [["pretrain", "imagenet/mae_vit_b"], ...]."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = [match for line in lines if (match := LAUNCHER.fullmatch(line.split("  #")[0].strip()))]
    return [["pretrain"] * (match[1] == "pretrain.py") + shlex.split(match[2], comments=True) for match in found]


LINES = [(page, words) for page in PAGES for words in commands(page) if words]


@pytest.mark.parametrize(
    ("page", "words"), LINES, ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else value.name
)
def test_a_command_is_one_that_maedistill_takes(page, words, monkeypatch):
    name, *rest = words
    if name == "--version" or "--help" in words:
        return
    monkeypatch.setattr(sys, "argv", ["maedistill", *words])
    module = import_module(f"maedistill.commands.{name}")
    if name in STAGES:
        arguments = import_module("maedistill.commands.stage")._parse(STAGES[name], "", "")
        if arguments.config and arguments.config not in OWN:
            load_config(arguments.config, arguments.overrides, root=STAGES[name], to_run=False)
    elif name == "evaluate":
        module.parse(rest)
    elif name == "study":
        arguments = module.parse()
        if arguments.study not in OWN:
            load_study(arguments.study)
    elif name == "benchmark":
        arguments = module.parse_arguments()
        config = getattr(arguments, "config", "CONFIG")
        assert config in OWN or CONFIGS in find_config(config).parents
    elif name != "quickstart":
        (module.parse if name == "export" else module.parse_arguments)()
    assert name in cli.COMMANDS


def test_every_command_stands_on_a_page():
    assert len(LINES) > 60 and {words[0] for _, words in LINES} >= cli.COMMANDS.keys()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_readme_and_security_lead_to_the_threat_model():
    for page in ("README.md", "SECURITY.md"):
        assert "(docs/promises.md" in (ROOT / page).read_text()


def test_ci_runs_on_what_the_package_supports():
    """With the oldest Python, and once with the oldest torch and torchvision."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["test"]
    matrix = workflow["strategy"]["matrix"]
    assert project["requires-python"] == f">={matrix['python'][0]}" and matrix["include"][0]["torch"] == "oldest"
    script = "\n".join(step.get("run", "") for step in workflow["steps"])
    for name in ("torch", "torchvision"):
        oldest = next(text for text in project["dependencies"] if text.startswith(f"{name}>=")).partition(">=")[2]
        assert f"{name}=={oldest}.*" in script, name
    assert "bash .ci/run" in script


def test_yaml_beside_the_package_is_yaml():
    files = [*(ROOT / ".github").rglob("*.yml"), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"]
    assert len(files) > 4 and all(isinstance(yaml.safe_load(file.read_text()), dict) for file in files)
