"""Pieces of an HTML page. Text is escaped unless it is `Html`, so nothing from outside can become markup."""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence

from PIL import Image

from maedistill.escaping import html

_VOID = ("br", "img", "input")  # elements without an end


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def element(name: str, *children: str, css: str = "", attributes: Mapping[str, str] | None = None) -> Html:
    """Return an element. css: its class."""
    named = {"class": css} if css else {}
    words = "".join(f' {key}="{html(value)}"' for key, value in (named | dict(attributes or {})).items())
    return Html(f"<{name}{words}>" + ("" if name in _VOID else f"{joined(children)}</{name}>"))


def joined(children: Iterable[str]) -> Html:
    """Return the pieces in a row."""
    return Html("".join(child if isinstance(child, Html) else html(child) for child in children))


def section(title: str, *children: str) -> Html:
    """Return a section with a heading; nothing if it is empty."""
    return element("section", element("h2", title), *children) if any(children) else Html()


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, marked: Sequence[bool] = ()) -> Html:
    """Return a table whose first column is a heading. heads: may be none. marked: rows that stand out."""
    marks = marked or [False] * len(rows)
    head = element("thead", element("tr", *(element("th", text) for text in heads))) if heads else Html()
    lines = [
        element("tr", element("th", cells[0]), *(element("td", text) for text in cells[1:]), css="marked" * mark)
        for cells, mark in zip(rows, marks, strict=True)
    ]
    return element("div", element("table", head, element("tbody", *lines)), css="scroll")


def folded(title: str, *children: str) -> Html:
    """Return what is seen once its title is clicked."""
    return element("details", element("summary", title), *children)


def tiles(facts: Mapping[str, str]) -> Html:
    """Return a few facts in large type."""
    return element("dl", *(element("div", element("dt", k), element("dd", v)) for k, v in facts.items()), css="tiles")


def command(line: str, about: str) -> Html:
    """Return a command that can be copied."""
    button = element("button", "Copy", attributes={"type": "button"})
    return element("div", element("p", about), element("pre", element("code", line)), button, css="command")


class Album:
    """The pictures of a page, which together take no more than so many bytes of it. Others are left out."""

    def __init__(self, limit: int) -> None:
        self.left = limit

    def add(self, picture: Image.Image, about: str, *, css: str = "") -> Html:
        """Return the picture as an element; a note in its place if there is no room."""
        data = io.BytesIO()
        picture.convert("RGB").save(data, "JPEG", quality=82)
        address = f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
        if len(address) > self.left:
            return element("small", f"{about}: left out, for a page has room for so many pictures only")
        self.left -= len(address)
        size = {"width": str(picture.width), "height": str(picture.height)}
        return Html(element("img", css=css, attributes=size | {"alt": about})[:-1] + f' src="{address}">')
