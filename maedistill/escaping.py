"""Text as it is shown: what data, weights, files, peers and libraries say stays one line, and secrets are masked.

shown -> one line of console or log      markdown, code -> a piece of a page      cell -> CSV      masked -> no secrets
without_paths -> what strangers may read: no folder of this machine
say, warn -> stdout or stderr, for everything that the package prints

Files that are read again (an index, classes.json, run.json) keep every character.
"""

import os
import re
import shlex
import sys
import traceback
from contextlib import suppress

_COLOURS = {"error": 31, "warning": 33}  # red, yellow
_NUMBER = re.compile(r"[-+]?[\d.]+(e[-+]?\d+)?")
_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")  # what a spreadsheet computes; it takes the wide ones alike
_MARKUP = re.compile(r"[\\`*\[<&|]|(?<![^\W_])_|_(?![^\W_])")  # an underscore within a word is one

# USER:PASSWORD@ or TOKEN@. A password may hold "/" and "@", and an error may quote an address without its end: what
# follows `//name:` is hidden up to the last "@", or to the end, unless it is a port. Path() makes s3:// into s3:/.
_LOGIN = re.compile(
    r"(?i)\b([a-z][a-z0-9+.-]{0,30}://|(?:https?|s?ftp|ssh|s3a?|gc?s|hf|az|abfss?|hdfs):/+)"
    r"""([^\s/@:[]*:(?!\d+(?:[^\w@.]|$))(?:\S*@|[^\s'"]*)|[^\s/]+(?:@|%40))"""
)
# USER:PASSWORD@ wherever else it stands: without a scheme, in a path, after hf-hub:. It is sought in what ends in an @,
# so that long texts cost no more than their length.
_BEFORE_AT = re.compile(
    r"(?i)(?:(?<![^\s/@])|(?<=%40))(?:[^\s/@%]|%(?!40))+(?:@|%40)|(?<=hf-hub:)[^\s/@:]+:[^\s@]{1,999}@"
)
_NO_USER = r"""\s/@:=,;&?%'"()<>[\]{}"""
_PAIR = re.compile(
    rf"(?i)(?<![^{_NO_USER}])(?!(?:run|timm|hf-hub|local-dir|file|random|python|mailto):)"
    rf"(?:[^{_NO_USER}]|%(?!3A))+(?::|%3A)"
    r"""(?![\\/:'"]|\d\d(?::\d\d)?(?:@|%40)).+(?:@|%40)"""  # not C:\, a::b, "a":"b", nor a time
)
_HEADER = re.compile(
    r"""(?i)(authorization['"]?[:=]\s*['"]?(?:(?:bearer|basic|token)\s+)?|\bx-[\w-]{0,40}(?:key|token)['"]?[:=]\s*"""
    r"""|\bbearer\s+|(?-i:\bBasic )(?=[^\s'"]{6})(?=\S[^\s'"]*(?-i:[A-Z\d=])))[^\s'"]+"""
)
_QUERY = re.compile(
    r"(?i)([?&;][\w.-]*(?:token|secret|signature|passw|pwd|credential|key)[\w.-]*=|[?&;](?:sig|auth)=)[^\s&;'\"]+"
)
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")  # of the Hugging Face hub, wherever it stands

# A path from the root, from ~ or through "..", up to two spaces, which separate parts of a line, or to the end: names
# of folders may hold anything else. An address is none: https://HOST/PATH.
_LOGIN_AT = re.compile(r"\b[\w.+-]{1,64}@[\w.-]{1,255}:(?=[/~])")  # of ssh, before a path
_LOCAL_KIND = re.compile(r"\b(run|local-dir|file|onnx|torch_export):/+")
_LOCAL_PATH = re.compile(
    r"""(?:(?<=:)/(?![\s/])|(?:(?<=[\s='"\[({,<])|^)/+(?![\s/])|"""
    r"""(?:(?<=[\s=:'"\[({,<])|^)(?:~[\w.-]*(?=/)|(?:[^\s='":\[({,<]*/)?\.\./))(?:(?!\s\s).)*"""
)


def without_paths(text: str, *, command: bool = False, word: bool = False) -> str:
    """Return the text with PATH in place of paths that say where something lies on this machine.

    command: the text is a command line, of which each word may hold one. word: it has no parts, a path ends with it.
    """
    if not command:
        text = " ".join(text.split()) if word else text
        return _LOCAL_PATH.sub("PATH", _LOCAL_KIND.sub(r"\1:/", _LOGIN_AT.sub("", text)))
    try:
        return shlex.join(without_paths(each, word=True) for each in shlex.split(text))
    except ValueError:  # quotes without an end: no word is certain
        return without_paths(text, word=True)


def masked(text: str) -> str:
    """Return the text with *** in place of passwords and tokens in addresses of any scheme."""
    text = _BEFORE_AT.sub(lambda match: _PAIR.sub("***@", match[0]), _LOGIN.sub(_without_login, text))
    return _TOKEN.sub("***", _HEADER.sub(r"\1***", _QUERY.sub(r"\1***", text)))


def _without_login(match: re.Match[str]) -> str:
    """Hide what stands before the @ of an address, except the name of a repository: hf://NAME@REVISION."""
    scheme, login = match.groups()
    is_name = scheme.lower().startswith("hf:") and not re.match("(?i)hf_|[*]{3}|.*(:|%3A)", login)
    return match[0] if is_name else f"{scheme}***@"


def has_secret(text: str) -> bool:
    """Return whether an address holds a password or a token, or the *** that a record has in its place."""
    return masked(text) != text or "***@" in text or "=***" in text


def shown(text: object) -> str:
    r"""Return the text as one line that cannot steer a terminal, without secrets: line breaks become \n, ESC \x1b."""
    text = masked(str(text))
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def markdown(text: object) -> str:
    """Return the text for a line or table cell of Markdown, where it is neither markup nor HTML."""
    return _MARKUP.sub(lambda match: f"&#{ord(match[0])};", shown(text))


def code(text: object) -> str:
    """Return the text as code in a line of Markdown."""
    text = shown(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if len(fence) > 1 else f"{fence}{text}{fence}"


def cell(value: str | int) -> str | int:
    """Return the value for a CSV file: text that a spreadsheet would take for a formula gets an apostrophe."""
    if isinstance(value, int):
        return value
    text = shown(value)
    return f"'{text}" if text.startswith(_FORMULA) and not _NUMBER.fullmatch(text) else text


def say(*lines: str, error: bool = False) -> None:
    """Print lines on stdout, or stderr: `error:` and `warning:` are then coloured. Each argument stays one line."""
    texts = map(shown, lines)
    stream = sys.stderr if error else sys.stdout
    whole = "\n".join(map(_in_colour, texts) if error else texts)
    print(f"{whole}\n", end="", file=stream, flush=True)  # one write, since threads print too


def warn(text: str) -> None:
    """Print one line of warning to stderr. A closed stderr is no error, so any process or thread may warn."""
    with suppress(OSError, ValueError):
        say(f"warning: {text}", error=True)


def _in_colour(text: str) -> str:
    """Colour the `error:` or `warning:` that a text begins with, if stderr is a terminal and NO_COLOR is not set."""
    kind, colon, rest = text.partition(":")
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not sys.stderr.isatty()
    return text if plain or kind not in _COLOURS else f"\x1b[{_COLOURS[kind]}m{kind}{colon}\x1b[0m{rest}"


def traceback_lines(error: BaseException) -> list[str]:
    """Return the traceback of an error, in which no further line of its text begins at the margin."""
    entries = traceback.format_exception(error)
    return [shown(line) for entry in entries for line in entry.rstrip("\n").replace("\n", "\n  ").split("\n")]
