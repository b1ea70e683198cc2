"""A whole page as one HTML file that loads nothing: style, script, BokehJS, plots and pictures are in it.

The page forbids requests to itself by its content security policy, so no text or plot in it can make one.
"""

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from maedistill.durable import write_durably
from maedistill.errors import DataError
from maedistill.report.interactive import embed
from maedistill.report.markup import Album, Html, element, joined

if TYPE_CHECKING:
    from bokeh.plotting import figure

_PICTURE_BYTES = 2_000_000  # of all pictures of a page; BokehJS has 1.3 MB
_HERE = Path(__file__).parent
_POLICY = "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


class Page:
    """Sections in their order, and the plots in them."""

    def __init__(self, title: str, about: str, *, running: bool = False) -> None:
        self.title, self.about, self.running = title, about, running
        self.sections: list[Html] = []
        self.plots: dict[str, figure] = {}
        self.album = Album(_PICTURE_BYTES)

    def add(self, title: str, *children: str) -> None:
        """Add a section with a heading, unless it is empty."""
        if any(children):
            self.sections.append(element("section", element("h2", title), *children))

    def add_plots(self, title: str, plots: Mapping[str, "figure"], *above: str, css: str = "plots") -> None:
        """Add a section of plots, with what stands above them."""
        if plots:
            # NUL: escaped text has none
            keys = {f"{len(self.plots)}_{i}": name for i, name in enumerate(plots)}
            self.plots |= {key: plots[name] for key, name in keys.items()}
            places = (element("figure", element("figcaption", name), Html(f"\0{key}\0")) for key, name in keys.items())
            self.add(title, *above, element("div", *places, css=css))

    def write(self, file: Path) -> Path:
        """Write the page, whole or not at all. Raises DataError if the disk refuses it."""
        script, places = embed(self.plots) if self.plots else ("", {})
        body = joined(self.sections)
        for key, place in places.items():
            body = Html(body.replace(f"\0{key}\0", place))
        now = datetime.now().astimezone().isoformat(" ", "minutes")
        made = element("p", f"{self.about}. Page made {now}.", css="about")
        live = Html('<label class="live"><input type="checkbox"> Reload every 30 s</label>' if self.running else "")
        text = (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
            f"{element('title', self.title)}<style>{(_HERE / 'page.css').read_text()}</style></head>\n<body>"
            f"{element('header', element('h1', self.title), made, live)}<main>{body}</main>\n"
            f"<script>{script}</script>\n<script>{(_HERE / 'page.js').read_text()}</script></body></html>\n"
        )
        try:
            write_durably(file, text.encode())
        except OSError as error:
            raise DataError(
                f"{file} cannot be written ({error.strerror})",
                "name a file elsewhere with --out, or free disk space or correct the permissions there",
            ) from error
        return file
