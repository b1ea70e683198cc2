"""The error texts of the package, from its source: each `XError(cause, remedy)` with PLACEHOLDERS for what varies."""

import ast
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

CODES = {"ConfigError": 2, "DataError": 3, "NumericsError": 4, "PeerError": 5}
RULES = {"Problem": 2, "Refusal": 2}  # of settings: the place of the setting comes before the text, as first argument
MOST = 4  # alternatives of one text

Texts = Mapping[str, list[str]]


@dataclass(frozen=True)
class ErrorText:
    """One error as a template: PLACEHOLDERS are in capitals. file: its module, relative to the package."""

    code: int
    cause: str
    remedy: str
    file: str
    is_rule: bool


@cache
def error_texts(package: Path) -> list[ErrorText]:
    """Return the texts of every error of a package, in the order of its files, each once."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        for text in _Module(path, str(path.relative_to(package))).texts():
            found.setdefault((text.code, text.cause, text.remedy), text)
    return list(found.values())


class _Module:
    """One source file. Names are looked up in the function around them, then among the constants of the file."""

    def __init__(self, path: Path, name: str) -> None:
        self.name, self.tree = name, ast.parse(path.read_text())
        self.parents = {child: node for node in ast.walk(self.tree) for child in ast.iter_child_nodes(node)}
        calls = [node for node in self.parents if isinstance(node, ast.Call)]
        self.calls = sorted(calls, key=lambda call: (call.lineno, call.col_offset))

    def texts(self) -> Iterator[ErrorText]:
        for call in self.calls:
            name = _name(call.func)
            is_rule = name in RULES
            arguments = call.args[1:] if is_rule else call.args
            if name not in CODES | RULES or len(arguments) != 2:
                continue
            for known in self._environments(call):
                for pair in itertools.product(*(self._texts(argument, known) for argument in arguments)):
                    yield ErrorText((CODES | RULES)[name], *pair, self.name, is_rule)

    def _function(self, node: ast.AST) -> ast.FunctionDef | None:
        """Return the function around a node."""
        while (node := self.parents.get(node)) is not None:  # type: ignore[assignment]
            if isinstance(node, ast.FunctionDef):
                return node
        return None

    def _environments(self, call: ast.Call) -> list[Texts]:
        """Return what the parameters in an error's texts are, for each call of a private function that raises it."""
        function = self._function(call)
        if function is None or not function.name.startswith("_"):
            return [{}]
        names = {node.id for argument in call.args for node in ast.walk(argument) if isinstance(node, ast.Name)}
        inputs = function.args
        places = [arg.arg for arg in inputs.args if arg.arg != "self"]
        defaults = dict(zip(reversed(places), reversed(inputs.defaults), strict=False))
        defaults |= {arg.arg: value for arg, value in zip(inputs.kwonlyargs, inputs.kw_defaults, strict=True) if value}
        found = []
        for use in self.calls:
            if _name(use.func) == function.name and use is not call:
                given = {**defaults, **dict(zip(places, use.args, strict=False))}
                given |= {word.arg: word.value for word in use.keywords if word.arg}
                known = {name: self._texts(node, {}) for name, node in given.items() if name in names}
                found.append({name: texts for name, texts in known.items() if not _is_placeholder(texts)})
        return [known for known in found if known] or [{}]

    def _texts(self, node: ast.AST, known: Texts) -> list[str]:
        """Return what an expression may say, at most MOST texts."""
        match node:
            case ast.Constant(value=str(text)):
                return [text]
            case ast.Constant(value=value):
                return [str(value)]
            case ast.JoinedStr(values=parts):
                return self._joined(parts, known)
            case ast.FormattedValue(value=value):
                return [f"{int(text):,}" if text.isdecimal() else text for text in self._texts(value, known)]
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return self._joined([left, right], known)
            case ast.IfExp(body=body, orelse=orelse):
                texts = [*self._texts(body, known), *self._texts(orelse, known)]
                return texts if len(texts) <= MOST else ["..."]
            case ast.Name(id=name) if name in known:
                return known[name]
            case ast.Name() if (value := self._assigned(node)) is not None:
                return self._texts(value, known)
        return [_placeholder(node)]

    def _joined(self, parts: list[ast.expr], known: Texts) -> list[str]:
        choices = [self._texts(part, known) for part in parts]
        for texts in sorted((c for c in choices if len(c) > 1), key=len, reverse=True):
            if _product(choices) > MOST:
                choices[choices.index(texts)] = ["..."]
        return ["".join(row) for row in itertools.product(*choices)]

    def _assigned(self, name: ast.Name) -> ast.expr | None:
        """Return the text that a name was last given, in the same function above it, or as a constant of the file."""
        function = self._function(name)
        inner = ast.walk(function) if function else ()
        for nodes in (inner, self.tree.body):
            values = []
            for node in nodes:
                if isinstance(node, ast.Assign) and (nodes is self.tree.body or node.lineno < name.lineno):
                    values += [(node.lineno, value) for target, value in _pairs(node) if target == name.id]
            if values:
                return max(values, key=lambda pair: pair[0])[1]
        return None


def _pairs(node: ast.Assign) -> Iterator[tuple[str, ast.expr]]:
    """Return the names that an assignment sets to a text, and the texts."""
    for target in node.targets:
        pairs = [(target, node.value)]
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            pairs = list(zip(target.elts, node.value.elts, strict=True))
        for one, value in pairs:
            if isinstance(one, ast.Name) and isinstance(value, ast.Constant | ast.JoinedStr | ast.BinOp | ast.IfExp):
                yield one.id, value


def _name(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _placeholder(node: ast.AST) -> str:
    """Return a word in capitals for what varies: the last name of an expression."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name.strip("_").upper()
        case ast.Subscript(value=value) | ast.FormattedValue(value=value) | ast.Starred(value=value):
            return _placeholder(value)
        case ast.Call(args=[ast.Name() | ast.Attribute() | ast.Subscript() as argument]):
            return _placeholder(argument)
    return "..."


def _is_placeholder(texts: list[str]) -> bool:
    return all(text == text.upper() for text in texts)


def _product(choices: list[list[str]]) -> int:
    total = 1
    for texts in choices:
        total *= len(texts)
    return total
