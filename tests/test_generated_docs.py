"""The generated pages of docs/ are what the code says now, and the generators miss nothing."""

import ast
import re
from importlib import import_module
from types import ModuleType

import pytest

from tests.support.launch import ROOT

PAGES = ("docs/configuration.md", "docs/configuration/pretraining.md", "docs/configuration/finetuning.md",
         "docs/command-line.md", "docs/troubleshooting.md", "docs/api.md")  # fmt: skip


@pytest.fixture(scope="module")
def parts():
    """tools/make_docs.py and the modules of its pages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        names = ("make_docs", *(f"docs_parts.{name}" for name in ("api", "error_texts", "site", "text")))
        yield {name.rpartition(".")[2]: import_module(name) for name in names}


def test_every_generated_page_is_tested(parts):
    assert tuple(parts["make_docs"].PAGES) == PAGES


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_what_the_code_says(parts, page):
    assert (ROOT / page).read_text() == parts["make_docs"].PAGES[page](), "run: python tools/make_docs.py"


def test_every_error_of_the_source_is_on_the_page(parts):
    """An error whose text is worked out elsewhere would be missing: such a text has no words of its own."""
    texts = parts["error_texts"].error_texts(ROOT / "maedistill")
    files = {text.file for text in texts}
    for path in (ROOT / "maedistill").rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        raises = [call for call in calls if getattr(call.func, "id", "") in parts["error_texts"].CODES]
        assert not raises or str(path.relative_to(ROOT / "maedistill")) in files, path
    page = (ROOT / "docs/troubleshooting.md").read_text()
    for words in ("cannot be shared evenly by WORLD_SIZE ranks", "spans several folders", "no file matches PATTERN"):
        assert words in page, words
    wordless = [text for text in texts if not re.search(r"[a-z]{3}", text.cause)]
    assert len(wordless) <= 10, wordless  # an f-string of another error's text alone


def test_error_texts_follow_names_branches_and_private_functions(parts, tmp_path):
    (tmp_path / "one.py").write_text("""
LIMIT = 4096
def read(path, few):
    remedy = "copy it again"
    if few:
        raise DataError(f"{path.name} has {'no' if few else 'one'} row, at most {LIMIT:,}", remedy)
    raise _refusal("is a folder", remedy=f"name a file below {path}")
def _refusal(problem, remedy="leave it out"):
    return ConfigError(f"run: {problem}", remedy)
""")
    found = [(t.code, t.cause, t.remedy) for t in parts["error_texts"].error_texts(tmp_path)]
    assert found == [
        (3, "NAME has no row, at most 4,096", "copy it again"),
        (3, "NAME has one row, at most 4,096", "copy it again"),
        (2, "run: is a folder", "name a file below PATH"),
    ]


def test_the_page_of_the_api_follows_imports_and_lazy_tables(parts, tmp_path):
    package = tmp_path / "maedistill"
    (package / "runs").mkdir(parents=True)
    (package / "__init__.py").write_text("""
from maedistill.runs.run import Run
__all__ = ["Run", "pretrain", "__version__"]
_HOMES = {"pretrain": "maedistill.runs.api"}
""")
    (package / "runs" / "run.py").write_text('''
class Run(Protocol):
    """A finished run."""
    path: Path
    @property
    def steps(self) -> int:
        """Return its steps."""
    def _hidden(self) -> None: ...
''')
    (package / "runs" / "api.py").write_text('''
def pretrain(config: str | Path, *, overrides: Sequence[str] = (), student: nn.Module | None = None) -> Run:
    """Pre-train a student.

    config: a name, <or> a file.

        pretrain("x")
    """
''')
    page = parts["api"].page(tmp_path)
    names = [line for line in page.splitlines() if line.startswith("## ") or line.startswith("### ")]
    assert names == ["## pretrain", "## Run", "### Run.steps (property)"]
    assert "    overrides: Sequence[str] = (),\n" in page and "config: a name, &lt;or> a file." in page
    assert "path: Path" in page and "_hidden" not in page and '```text\npretrain("x")\n```' in page


def test_links_lead_somewhere_on_the_site_as_well(parts: dict[str, ModuleType]):
    rewrite = parts["site"].site_links
    readme = "[a](docs/own-images.md#use-it) [b](CONTRIBUTING.md) [c](LICENSE) [d](https://e.org) ![e](docs/i/f.png)"
    expected = "[a](own-images.md#use-it) [b](contributing.md) c [d](https://e.org) ![e](i/f.png)"
    assert rewrite(readme, source="README.md", here="index.md") == expected
    page = "[a](../configuration.md#x) [b](../../CHANGELOG.md) [c](#d)\n```\n[e](../f.md)\n```"
    expected = "[a](../configuration.md#x) [b](../changelog.md) [c](#d)\n```\n[e](../f.md)\n```"
    assert rewrite(page, source="docs/configuration/one.md", here="configuration/one.md") == expected
    for file in parts["site"].ROOT_PAGES:
        assert (ROOT / file).is_file(), file
