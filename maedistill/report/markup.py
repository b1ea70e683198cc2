"""Pieces of an HTML page. Text is escaped unless it is `Html`, so nothing from outside can become markup."""

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence

from PIL import Image

from maedistill.escaping import shown

_VOID = ("br", "img", "input")  # elements without an end


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def element(name: str, *children: str, css: str = "", attributes: Mapping[str, str] | None = None) -> Html:
    """Return an element. css: its class."""
    named = ({"class": css} if css else {}) | dict(attributes or {})
    words = "".join(f' {key}="{joined([value])}"' for key, value in named.items())
    return Html(f"<{name}{words}>" + ("" if name in _VOID else f"{joined(children)}</{name}>"))


def joined(children: Iterable[str]) -> Html:
    """Return the pieces in a row."""
    return Html("".join(child if isinstance(child, Html) else html.escape(shown(child)) for child in children))


def note(text: str) -> Html:
    """Return a line of small print; nothing if it is empty."""
    return element("p", text, css="note") if text else Html()


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Html:
    """Return a table whose first column is a heading. heads: may be none."""
    head = element("thead", element("tr", *(element("th", text) for text in heads))) if heads else Html()
    lines = [element("tr", element("th", first), *(element("td", text) for text in rest)) for first, *rest in rows]
    return element("div", element("table", head, element("tbody", *lines)), css="scroll")


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
        address = Html(f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}")
        if len(address) > self.left:
            return element("small", f"{about}: left out: the page has no room for more pictures", css=css)
        self.left -= len(address)
        size = {"width": str(picture.width), "height": str(picture.height)}
        return element("img", css=css, attributes=size | {"alt": about, "src": address})
