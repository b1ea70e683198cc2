"""The prose of error messages about settings, in one golden file: tests/golden/messages.txt.

Tests assert codes, keys and numbers. The whole sentences stand in that file alone, so that rewording one changes one
place: `make messages` writes the file anew from what the code says now, and the diff is what a reviewer reads.
"""

from pathlib import Path

FILE = Path(__file__).resolve().parents[1] / "golden" / "messages.txt"


class Messages:
    """The golden file. rewrite: collect what is said now, for `write`, in place of comparing with it."""

    def __init__(self, *, rewrite: bool) -> None:
        self.rewrite = rewrite
        self.entries = {} if rewrite else _read()

    def check(self, name: str, cause: str, remedy: str, **places: object) -> None:
        """Compare the two lines of an error with the golden ones. places: {NAME: path}, written as {NAME} there."""
        for place, path in places.items():
            cause, remedy = (text.replace(str(path), f"{{{place}}}") for text in (cause, remedy))
        name = name.encode("unicode_escape").decode()
        if self.rewrite:
            assert self.entries.setdefault(name, (cause, remedy)) == (cause, remedy), f"two messages called {name}"
        else:
            assert self.entries.get(name) == (cause, remedy), f"{name}: `make messages` takes the new words"

    def write(self) -> None:
        """Write the golden file."""
        blocks = [f"# {name}\nerror: {cause}\n  fix: {remedy}\n" for name, (cause, remedy) in self.entries.items()]
        FILE.write_text("\n".join(blocks))


def _read() -> dict[str, tuple[str, str]]:
    entries = {}
    for block in FILE.read_text().split("\n\n"):
        name, cause, remedy = block.removesuffix("\n").split("\n")
        entries[name.removeprefix("# ")] = cause.removeprefix("error: "), remedy.removeprefix("  fix: ")
    return entries
