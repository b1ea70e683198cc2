"""CONTRIBUTING's steps lead to files and names that exist: how to add a key, a method, a term, a source, a command."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STEPS = [
    pytest.param(section, step, id=f"{section} {number}")
    for section, body in re.findall(
        r"^## (Add [^\n]+)\n(.+?)(?=^## |\Z)", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL | re.MULTILINE
    )
    for number, step in enumerate(re.split(r"^\d+\. |\n\n", body, flags=re.MULTILINE))
    if "`" in step
]
PACKAGE = "\n".join(file.read_text() for file in (ROOT / "maedistill").rglob("*.py"))
PLACEHOLDER = re.compile(r"NAME|KIND|FOLDER|\(\.\.\.\)|:")  # what the reader chooses


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
    titles = {step.values[0] for step in STEPS}
    nouns = ("config key", "pre-training method", "distillation term", "source of weights", "command")
    assert {f"Add a {noun}" for noun in nouns} <= titles and len(STEPS) > 25


@pytest.mark.parametrize(("section", "step"), STEPS)
def test_a_step_names_what_exists(section, step):
    files = files_of(step)
    names = [token for token in re.findall(r"`([^`]+)`", step) if re.fullmatch(r"[A-Za-z_][\w.]*(\(\))?", token)]
    names = [name.removesuffix("()") for name in names if not name.endswith((".py", ".md"))]
    texts = "\n".join(file.read_text() for file in files if file.suffix in (".py", ".md")) + PACKAGE
    for name in names:
        if not PLACEHOLDER.search(name):
            assert re.search(rf"\b{re.escape(name.rpartition('.')[2])}\b", texts), (section, name)
