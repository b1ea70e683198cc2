"""`maedistill COMMAND ...`: one table of commands. `python -m maedistill` and tools/*.py call the same functions.

A command is imported only when it is called, and imports heavy packages itself, so that `--help` and a wrong setting
cost a fraction of a second.
"""

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from maedistill import __version__
from maedistill.data.remote.user_cache import ensure_home
from maedistill.errors import ConfigError, leave, require_no_secret
from maedistill.escaping import say

COMMANDS = {
    "shards": "turn images into WebDataset shards with an index, or verify them",
    "pretrain": "pre-train a student by MAE, or distil a teacher by DMAE, AMD or token relations",
    "finetune": "fine-tune a network on labels, with or without teachers, and evaluate it",
    "evaluate": "count every validation image once; judge frozen features, or write them to disk",
    "knowledge": "quantify what networks know about images during training, and compare them",
    "export": "hand over a run's network with its card: for timm, as ONNX or torch.export, in int8, to the hub",
    "compare": "compare runs and exports by size, accuracy and latency",
    "study": "run and compare many trainings from one file",
    "report": "make a page of a run, of a study, or of several runs: one HTML file",
    "benchmark": "measure where time goes: loader, step, scale, cost",
    "quickstart": "run all steps on real digits, some minutes on two CPU cores",
}


def main() -> NoReturn:
    """Run the command that the command line names, and end the process with its exit code."""
    leave(lambda: _dispatch(sys.argv[1:]))


def run(name: str) -> NoReturn:
    """Run one command with the arguments of the command line, and end the process with its exit code."""
    leave(lambda: _dispatch([name, *sys.argv[1:]]))


def _dispatch(words: Sequence[str]) -> None:
    for word in words:  # before anything prints, records or parses them
        require_no_secret(word, f"command line {word}")
    # DeepSpeed's launcher adds the rank, before all other words; LOCAL_RANK holds it too.
    name, *arguments = [word for word in words if not word.startswith("--local_rank=")] or ["--help"]
    if name in ("-h", "--help"):
        lines = [f"  {command:<11} {about}" for command, about in COMMANDS.items()]
        say("usage: maedistill COMMAND ...", "", "commands:", *lines, "", "maedistill COMMAND --help shows details.")
    elif name == "--version":
        say(f"maedistill {__version__}")
    elif name in COMMANDS:
        ensure_home()
        sys.argv = ["maedistill", name, *arguments]  # what runs and reports record as their command
        import_module(f"maedistill.commands.{name}").main()
    else:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"commands are {', '.join(COMMANDS)}"
        raise ConfigError(f"there is no command {name!r}", remedy)
