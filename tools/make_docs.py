"""Write the pages of docs/ that are generated from the code. `make docs` runs it before it builds the site.

    python tools/make_docs.py

tests/test_generated_docs.py compares the pages in the repository with what this would write.
"""

from collections.abc import Callable
from pathlib import Path

from docs_parts import api, command_line, configuration, troubleshooting

ROOT = Path(__file__).resolve().parents[1]
PAGES: dict[str, Callable[[], str]] = {
    "docs/configuration.md": configuration.index,
    "docs/configuration/pretraining.md": configuration.pretraining,
    "docs/configuration/finetuning.md": configuration.finetuning,
    "docs/command-line.md": command_line.page,
    "docs/troubleshooting.md": lambda: troubleshooting.page(ROOT),
    "docs/api.md": lambda: api.page(ROOT),
}


def main() -> None:
    """Write every page, and say which have changed."""
    for name, page in PAGES.items():
        path, text = ROOT / name, page()
        if not path.exists() or path.read_text() != text:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            print(f"wrote {name}")


if __name__ == "__main__":
    main()
