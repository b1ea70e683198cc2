"""The hook of mkdocs.yml: README.md and its neighbours become pages of the site, and their links lead to pages.

On GitHub, links are relative to the file. The site knows the files of docs/ only, so links are resolved here as GitHub
does, then written relative to the page. What is no page of the site, such as a config, is named without a link.
"""

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT_PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "CODE_OF_CONDUCT.md": "code-of-conduct.md",
}
_LINK = re.compile(r"\[([^]]*)\]\(([^)#\s]*)(#[^)\s]*)?\)")
SOURCES = {page: file for file, page in ROOT_PAGES.items()}


def on_files(files: "Files", *, config: "MkDocsConfig") -> "Files":
    """Add the pages beside docs/."""
    from mkdocs.structure.files import File  # only `make docs` needs mkdocs; a test reads `site_links` without it

    root = Path(config.docs_dir).parent
    for name, page in ROOT_PAGES.items():
        files.append(File.generated(config, page, content=(root / name).read_text()))
    return files


def on_page_markdown(markdown: str, *, page: "Page", config: "MkDocsConfig", files: "Files") -> str:
    """Write the links of a page as the site needs them."""
    here = page.file.src_uri
    source = SOURCES.get(here, f"docs/{here}")
    return site_links(markdown, source=source, here=here)


def site_links(markdown: str, *, source: str, here: str) -> str:
    """Return Markdown whose links lead from page `here` of the site, not from file `source` of the repository."""

    def link(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        if not target or re.match(r"\w+:", target):
            return match[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        uri = ROOT_PAGES.get(file) or (file.removeprefix("docs/") if file.startswith("docs/") else None)
        if uri is None:
            return text
        return f"[{text}]({posixpath.relpath(uri, posixpath.dirname(here) or '.')}{anchor})"

    pieces = re.split(r"(```.*?```)", markdown, flags=re.DOTALL)
    return "".join(piece if piece.startswith("```") else _LINK.sub(link, piece) for piece in pieces)
