"""Markdown that GitHub and the site show alike: a table, a cell, the note of a generated page."""

import re
from collections.abc import Iterable, Sequence

GENERATED = "<!-- Written by tools/make_docs.py. Change the code, then run `python tools/make_docs.py`. -->"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table. The cells are Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def cell(text: str) -> str:
    """Return plain text as a cell of a table: on one line, and nothing in it is markup."""
    text = re.sub(r"([\\`*|\[\]]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))
    return text.replace("<", "&lt;").replace(">", "&gt;")


def code(text: str) -> str:
    """Return text as code in a cell. GitHub and the site both read \\| as a bar there."""
    text = " ".join(text.split()).replace("|", "\\|")
    return f"`` {text} ``" if "`" in text else f"`{text}`"
