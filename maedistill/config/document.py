"""Reads one YAML text into a flat dict of settings: dotted names -> (value, line).

Only a strict subset of YAML is read, so that a text cannot mean what its author did not see: plain data only, no tags,
no aliases, no duplicate keys, no multi-line text. Scalars follow YAML 1.2: `1e-3` is a number, while `yes`, `on`,
`1:30`, `007` and dates are text. The schema then rejects wrong types that YAML 1.1 would convert silently.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import yaml
from yaml.constructor import SafeConstructor

from maedistill.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parents[1]
CONFIGS = next(folder / "configs" for folder in (_PACKAGE, _PACKAGE.parent) if (folder / "configs").is_dir())  # ours
DEEPEST = 8
LONGEST = 100_000  # characters; limits the cost of naming a wrong file. Our configs have a few thousand
_NAME = re.compile(r"^[^\s:]+$")
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_FLOAT = r"[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)"
_TAG = "tag:yaml.org,2002:"
RESOLVERS = [  # (tag, what a scalar of this type looks like), in order of precedence
    (f"{_TAG}null", re.compile(r"^(?:~|null|Null|NULL|)$")),
    (f"{_TAG}bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")),
    (f"{_TAG}int", re.compile(r"^[-+]?(?:0|[1-9]\d{0,29})$")),
    (f"{_TAG}float", re.compile(f"^(?:{_FLOAT})$")),
]


class Refusal(Exception):
    """A text that is not YAML, or not in our subset. The caller knows its place and raises a `ConfigError` instead."""

    def __init__(self, line: int, cause: str, remedy: str) -> None:
        super().__init__(cause)
        self.line, self.cause, self.remedy = line, cause, remedy


def find_config(name: str | Path, *, beside: Path | None = None) -> Path:
    """Return the file of a config: `name` itself, or the file of that name in CONFIGS, such as imagenet/dmae_vit_b.

    beside: the file that names it, whose folder a relative path begins in; None for the working directory.
    """
    ours, theirs = CONFIGS / f"{name}.yaml", Path(os.path.expanduser(name))
    if beside is not None:
        theirs = Path(os.path.normpath(beside.parent / theirs))
    return ours if os.path.isfile(ours) and not os.path.isfile(theirs) else theirs


def config_name(path: str | Path) -> str:
    """Return what `find_config` takes for a file: its path, or the name of one of CONFIGS."""
    file = Path(path).resolve()
    return file.relative_to(CONFIGS).with_suffix("").as_posix() if CONFIGS in file.parents else str(path)


def read_file(path: Path) -> dict[str, tuple[Any, int]]:
    """Return the leaves of a YAML file in UTF-8. Raises OSError, UnicodeDecodeError, or ConfigError with the line."""
    with path.open(encoding="utf-8-sig") as file:
        text = file.read(LONGEST + 1)  # so that endless files (/dev/zero) are rejected
    try:
        return read_document(text)
    except Refusal as error:
        raise ConfigError(f"{path}:{error.line}: {error.cause}", error.remedy) from None


def read_document(text: str, *, prefix: str = "") -> dict[str, tuple[Any, int]]:
    """Return the leaves of a YAML text: dotted name -> (value, line from 1). Lists stay whole, mappings become dots.

    prefix: the dotted name whose value the text is. Raises `Refusal`.
    """
    if len(text) > LONGEST:
        raise Refusal(1, f"more than {LONGEST:,} characters, too much for settings", "check which file is meant")
    try:
        node = _StrictLoader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        remedy = "correct it there: indent with spaces, and put quotes around text with * & ! % @ ` { [ # or ': '"
        raise Refusal(mark.line + 1 if mark else 1, f"invalid YAML: {error.problem or error.context}", remedy) from None
    except yaml.reader.ReaderError as error:
        cause = f"invalid YAML: the character U+{error.character:04X} is not allowed"
        raise Refusal(text.count("\n", 0, error.position) + 1, cause, "remove it") from None
    except (ValueError, OverflowError) as error:  # PyYAML's own chr() and int(): "\\UFFFFFFFF", %YAML 99...9
        raise Refusal(1, f"invalid YAML: {str(error)[:200]}", "write the characters and numbers themselves") from None
    if node is None:
        return {prefix: (None, 1)}
    return dict(_leaves(node, prefix, node.start_mark.line + 1))


class _StrictLoader(yaml.SafeLoader):
    """Composes nodes and rejects aliases, tags and deep nesting; `_value` turns the nodes into values."""

    yaml_implicit_resolvers: ClassVar[dict[str | None, Any]] = {None: RESOLVERS}  # None: for any first character
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            remedy = "write the value itself; text that begins with * needs quotes"
            raise Refusal(line, f"*{event.anchor} is a YAML alias, which is not supported", remedy)
        if event.tag is not None:
            cause = f"{event.tag} is a YAML tag, which is not supported"
            raise Refusal(line, cause, "write plain values without ! tags")
        if self.depth == DEEPEST:
            raise Refusal(line, f"nested more than {DEEPEST} deep", "a config has sections and keys, no more")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _leaves(node: yaml.Node, name: str, line: int) -> Iterator[tuple[str, tuple[Any, int]]]:
    """Yield (dotted name, (value, line)) of everything below a node; the line is that of the key."""
    if not isinstance(node, yaml.MappingNode) or not node.value:
        yield name, (_value(node), line)
        return
    for key, value, key_line in _items(node):
        yield from _leaves(value, f"{name}.{key}" if name else key, key_line)


def _items(node: yaml.MappingNode) -> Iterator[tuple[str, yaml.Node, int]]:
    """Yield (key, value, line) of a mapping. Raises `Refusal` unless its keys are distinct plain names."""
    lines: dict[str, int] = {}
    for key_node, value in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != f"{_TAG}str" or not _NAME.match(key_node.value):
            raise Refusal(line, "a key is not a plain name", "write `name: value`")
        key = key_node.value
        if "." in key:
            section, _, leaf = key.partition(".")
            remedy = f"in a file write `{section}:` and below it, indented, `{leaf}: ...`"
            raise Refusal(line, f"{key}: dots are for the command line", remedy)
        if key in lines:
            raise Refusal(line, f"{key} is given twice, first in line {lines[key]}", "keep one of them")
        lines[key] = line
        yield key, value, line


def _value(node: yaml.Node) -> Any:
    """Return the plain value of a node: dict, list, text, number, bool or None."""
    if isinstance(node, yaml.MappingNode):
        return {key: _value(value) for key, value, _ in _items(node)}
    if isinstance(node, yaml.SequenceNode):
        return [_value(item) for item in node.value]
    value = SafeConstructor().construct_object(node)  # .inf and .nan, too; the schema rejects both
    if isinstance(value, str) and UNPRINTABLE.search(value):
        raise Refusal(node.start_mark.line + 1, "text with line breaks or control characters", "write one plain line")
    return value
