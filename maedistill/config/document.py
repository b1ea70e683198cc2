"""Reads one YAML text into a flat dict of settings: dotted names -> (value, line).

Only a strict subset of YAML is read, so that a text cannot mean what its author did not see: plain data only, no tags,
no aliases, no duplicate keys, no multi-line text. Scalars follow YAML 1.2: `1e-3` is a number, while `yes`, `on`,
`1:30`, `007` and dates are text. The schema then rejects wrong types that YAML 1.1 would convert silently.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import yaml

DEEPEST = 8
LONGEST = 100_000  # characters; limits the cost of naming a wrong file. Our configs have a few thousand
_NAME = re.compile(r"^[^\s:]+$")
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_NULL, _BOOL, _INT, _FLOAT, _STR = (f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str"))
# In order of precedence, each with the possible first characters of such a scalar.
RESOLVERS = (
    (_NULL, re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    (_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    (_INT, re.compile(r"^[-+]?(?:0|[1-9]\d{0,29})$"), list("-+0123456789")),
    (
        _FLOAT,
        re.compile(
            r"^[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
        ),
        list("-+.0123456789"),
    ),
)


class Refusal(Exception):
    """A text that is not YAML, or not in our subset. The caller knows the file and raises a `ConfigError` instead."""

    def __init__(self, line: int, cause: str, remedy: str) -> None:
        super().__init__(cause)
        self.line, self.cause, self.remedy = line, cause, remedy


def read_text(path: Path) -> str:
    """Read at most LONGEST + 1 characters of a UTF-8 file, so that endless files (/dev/zero) are rejected."""
    with path.open(encoding="utf-8-sig") as file:
        return file.read(LONGEST + 1)


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
        line = text.count("\n", 0, error.position) + 1
        raise Refusal(
            line, f"invalid YAML: the character U+{error.character:04X} is not allowed", "remove it"
        ) from None
    except (ValueError, OverflowError) as error:  # PyYAML's own chr() and int(): "\\UFFFFFFFF", %YAML 99...9
        raise Refusal(1, f"invalid YAML: {str(error)[:200]}", "write the characters and numbers themselves") from None
    if node is None:
        return {prefix: (None, 1)}
    return dict(_leaves(node, prefix, node.start_mark.line + 1))


class _StrictLoader(yaml.SafeLoader):
    """Composes nodes and rejects aliases, tags and deep nesting; `_value` turns the nodes into values."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            remedy = "write the value itself; text that begins with * needs quotes"
            raise Refusal(line, f"*{event.anchor} is a YAML alias, which is not supported", remedy)
        if event.tag is not None:
            raise Refusal(
                line, f"{event.tag} is a YAML tag, which is not supported", "write plain values without ! tags"
            )
        if self.depth == DEEPEST:
            raise Refusal(line, f"nested more than {DEEPEST} deep", "a config has sections and keys, no more")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


for _tag, _regexp, _first in RESOLVERS:
    _StrictLoader.add_implicit_resolver(_tag, _regexp, _first)


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
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _STR or not _NAME.match(key_node.value):
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
    text = node.value
    if node.tag == _NULL:
        return None
    if node.tag == _BOOL:
        return text.lower() == "true"
    if node.tag == _INT:
        return int(text)
    if node.tag == _FLOAT:
        return float(re.sub(r"\.(?=[in])", "", text.lower()))  # .inf and .nan; the schema rejects both
    if _UNPRINTABLE.search(text):
        raise Refusal(node.start_mark.line + 1, "text with line breaks or control characters", "write one plain line")
    return text
