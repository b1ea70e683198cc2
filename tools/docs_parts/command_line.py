"""The page of `--help` of every command, as the commands print it."""

import os
import sys
from contextlib import redirect_stdout, suppress
from importlib import import_module
from io import StringIO
from unittest.mock import patch

from docs_parts.text import GENERATED
from maedistill import cli

SUBCOMMANDS = {
    "evaluate": ("knn", "probe", "embed", "segment", "exits"),
    "benchmark": ("loader", "step", "scale", "cost"),
}
INTRODUCTION = """\
After reading this page you know every command and every option: it is what `maedistill COMMAND --help` prints.

```bash
maedistill --help
maedistill --version
maedistill pretrain --help
```

`python -m maedistill COMMAND` is the same. So are the scripts in `tools/` of a checkout, such as `tools/pretrain.py`
(`tools/make_shards.py` for `shards`), for launchers that start a file. Exit codes are in
[troubleshooting](troubleshooting.md#exit-codes), config keys in [configuration](configuration.md)."""


def page() -> str:
    """Return the page."""
    parts = ["# Command line", GENERATED, INTRODUCTION, "## maedistill", _block(_help([]))]
    for command, about in cli.COMMANDS.items():
        parts += [f"## maedistill {command}", f"{about[0].upper()}{about[1:]}.", _block(_help([command]))]
        for kind in SUBCOMMANDS.get(command, ()):
            parts += [f"### maedistill {command} {kind}", _block(_help([command, kind]))]
    return "\n\n".join(parts) + "\n"


def _help(words: list[str]) -> str:
    """Return what `maedistill WORDS --help` prints, on a terminal of 100 columns."""
    out = StringIO()
    line = patch.object(sys, "argv", ["maedistill", *words, "--help"])
    with patch.dict(os.environ, COLUMNS="100"), line, redirect_stdout(out), suppress(SystemExit):
        if words:
            import_module(f"maedistill.commands.{words[0]}").main()
        else:
            cli._dispatch(["--help"])
    return out.getvalue()


def _block(text: str) -> str:
    lines = "\n".join(line.rstrip() for line in text.strip("\n").splitlines())
    return f"```text\n{lines}\n```"
