"""The page of every error message: wrong settings from tests/golden/messages.txt, all others from the source."""

import re
from collections.abc import Iterable
from pathlib import Path

from docs_parts.error_texts import ErrorText, error_texts
from docs_parts.text import GENERATED, cell, code, table

INTRODUCTION = """\
After reading this page you can find an error by its text, and you know its cause and what to do. Search it for a few
words of the message.

```text
error: command line optim.lrr=1e-3: unknown key optim.lrr
  fix: did you mean optim.lr?
```

An error is two lines on stderr: the cause, and what to do. Words in CAPITALS below stand for variable parts, such as a
path or a number, and `...` for longer parts. A traceback is a bug in maedistill: report it with the command and
`RUN/run.json`. Questions without an error text are in [questions](faq.md).

## Exit codes

| code | meaning | what to do |
|---|---|---|
| 0 | done | |
| 1 | a bug, with a traceback; from torchrun, any failure of a rank | read `RUN/exit.json` for the actual code |
| 2 | [usage: settings, command line, a run folder made with other settings](#exit-code-2) | change the command |
| 3 | [data: shards, images, labels, damaged checkpoints or weights, a full disk](#exit-code-3) | repair the files |
| 4 | [numerics: a loss or gradient that is not finite](#exit-code-4) | look at the samples, lower the learning rate |
| 5 | [another process of the run, or the hardware](#exit-code-5) | start the same command again |
| 75 | stopped by SIGTERM or SIGUSR1; the state is saved | start the same command again |
| 130 | Ctrl-C; saved if training had begun | start the same command again |
| 141 | the reader of the output has exited, as with `head` | |

For unknown options and missing arguments, the command line prints its usage and also exits with 2.

Three messages are composed when a run ends:

| text | meaning |
|---|---|
| `no step for 600 s: rank 1 ... is in PLACE; the others wait` | that rank hangs, exit code 5 |
| `stopped by SIGTERM after step N, which is saved; the same command continues from there` | exit code 75 |
| `stopped by Ctrl-C after step N, which is saved` | exit code 130 |"""
SETTINGS = """\
The text comes after the place of the setting: `command line KEY=VALUE:` or `FILE:LINE KEY:`. `(other problems: KEY,
KEY)` at its end names other keys that are wrong as well. Every rule with an example:"""
OTHER = "Others"
LONGEST = 120  # characters of a setting
AREAS = {
    "cli": "Command line", "commands": "Command line", "config": "Settings: other texts", "data/shards": "Shards",
    "data/images": "Images", "data/loading": "Loader", "data/remote": "Remote shards",
    "weights": "Networks and weights", "models": "Networks and weights",
    "methods": "Teachers of pre-training", "pretraining": "Pre-training",
    "finetuning": "Fine-tuning and distillation", "training": "Engine", "runs": "Run folders and checkpoints",
    "processes": "Ranks and launchers", "evaluation": "Evaluation", "analysis": "Quantified knowledge",
    "exporting": "Export", "study": "Studies", "benchmark": "Benchmarks", "report": "Reports",
    "api.py": "Python API", "errors.py": "GPU",
}  # fmt: skip


def page(root: Path) -> str:
    """Return the page."""
    examples = golden_examples(root / "tests" / "golden" / "messages.txt")
    texts = [text for text in error_texts(root / "maedistill") if _says_something(text)]
    shown = "\n".join(cause for _, cause, _ in examples)
    texts = [text for text in texts if not (text.is_rule and re.search(_pattern(text.cause), shown))]
    parts = ["# Troubleshooting", GENERATED, INTRODUCTION]
    for number in sorted({text.code for text in texts}):
        parts.append(f"## Exit code {number}")
        if number == 2:
            rows = [[code(cause), cell(remedy), code(example)] for example, cause, remedy in examples]
            parts += ["### Settings", SETTINGS, table(["error", "what to do", "example of a setting"], rows)]
        parts += _areas([text for text in texts if text.code == number], number)
    return "\n\n".join(parts) + "\n"


def golden_examples(file: Path) -> list[tuple[str, str, str]]:
    """Return (setting, error without its place, remedy) of each text in the golden file, each once.

    Settings that are long only to be too long are left out: they would make the table wide.
    """
    found: dict[tuple[str, str], str] = {}
    for block in file.read_text().strip().split("\n\n"):
        name, cause, remedy = block.splitlines()
        setting = name.removeprefix("# ").partition(" | ")[2]
        cause = cause.removeprefix("error: ").removeprefix(f"command line {setting}: ")
        cause = re.sub(r"^command line .+?: (?=[a-z*!])", "", cause)  # its control characters are escaped once
        setting = "a line of a file" if setting.startswith("file | ") else setting
        cause = re.sub(r"^\{FOLDER\}/[\w.]+:\d+( [\w.]+)?: |^[\w.]+: (?=no |a |neither )", "", cause)
        texts = (cause, remedy.removeprefix("  fix: "))
        found.setdefault((texts[0].replace("{FOLDER}", "FOLDER"), texts[1].replace("{FOLDER}", "FOLDER")), setting)
    return [(setting, cause, remedy) for (cause, remedy), setting in found.items() if len(setting) <= LONGEST]


def _areas(texts: Iterable[ErrorText], number: int) -> list[str]:
    """Return one table per area of the package."""
    areas: dict[str, dict[str, list[str]]] = {}
    for text in texts:
        causes = areas.setdefault(_area(text.file), {})
        causes.setdefault(text.cause, []).append(text.remedy)
    parts = []
    for area in dict.fromkeys([*AREAS.values(), OTHER]):
        if area in areas:
            rows = [[code(cause), cell("; or: ".join(dict.fromkeys(fixes)))] for cause, fixes in areas[area].items()]
            parts += [f"### {area} ({number})", table(["error", "what to do"], rows)]
    return parts


def _area(file: str) -> str:
    names = (file, file.rpartition("/")[0], file.partition("/")[0], file.removesuffix(".py"))
    return next((AREAS[name] for name in names if name in AREAS), OTHER)


def _says_something(text: ErrorText) -> bool:
    """Return whether a text has words of its own, and not only those of another error that it passes on."""
    return re.search(r"[a-z]{3}|MAEDISTILL", text.cause) is not None


def _pattern(cause: str) -> str:
    """Return a pattern for what a template may say."""
    return ".+".join(map(re.escape, re.split(r"[A-Z][A-Z_0-9]{2,}|\.\.\.", cause)))
