"""The page of the Python API: the names of `maedistill.__all__`, their signatures and docstrings, read from the source.

Nothing is imported, so that the page costs no time and does not depend on the version of Python.
"""

import ast
import inspect
from dataclasses import dataclass
from pathlib import Path

from docs_parts.text import GENERATED

INTRODUCTION = "After reading this page you know what `import maedistill` offers, and what each name takes and returns."
_SHOWN = ("__init__", "__call__")
NONE_YET = """\
There are no such names yet. Use the [commands](command-line.md): `maedistill pretrain` and the others do everything.
Modules below `maedistill` may change at any version."""


@dataclass(frozen=True)
class Named:
    """A public name: the file that defines it, and its definition."""

    name: str
    file: Path
    node: ast.FunctionDef | ast.ClassDef | ast.Assign


def page(root: Path) -> str:
    """Return the page."""
    parts = ["# Python API", GENERATED, INTRODUCTION]
    names = public_names(root)
    if names:
        parts.append("How to use them, with programs that run: [from Python](python.md).")
    for named in names:
        parts += [f"## {named.name}", *_describe(named, root)]
    return "\n\n".join(parts if names else [*parts, NONE_YET]) + "\n"


def public_names(root: Path) -> list[Named]:
    """Return what `maedistill.__all__` names: functions first, otherwise in its order."""
    module = ast.parse((root / "maedistill" / "__init__.py").read_text())
    lists = [node.value for node in ast.walk(module) if _assigns(node, "__all__")]
    names = [str(item.value) for item in lists[0].elts] if lists else []
    found = [_find(name, "maedistill", root) for name in names if not name.startswith("__")]
    return sorted(found, key=lambda named: not isinstance(named.node, ast.FunctionDef))


def _find(name: str, module: str, root: Path) -> Named:
    """Return where a name of a module is defined; follow imports and tables of lazy imports, {name: module}."""
    file = root.joinpath(*module.split("."))
    file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
    tree = ast.parse(file.read_text())
    for node in tree.body:
        if (isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name) or _assigns(node, name):
            return Named(name, file, node)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _find(alias.name, str(node.module), root)
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                words = [part.value for part in ast.walk(value) if isinstance(part, ast.Constant)]
                if isinstance(key, ast.Constant) and key.value == name and words:
                    target = str(words[0])
                    target = target if target.startswith("maedistill") else f"maedistill.{target}"
                    return _find(str(words[1]) if len(words) > 1 else name, target, root)
    raise LookupError(f"maedistill.__all__ names {name}, but {file} neither defines nor imports it")


def _assigns(node: ast.AST, name: str) -> bool:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return any(isinstance(target, ast.Name) and target.id == name for target in targets)


def _describe(named: Named, root: Path) -> list[str]:
    """Return signature, docstring and, of a class, its public members."""
    node = named.node
    where = f"Defined in `{named.file.relative_to(root)}`."
    if isinstance(node, ast.FunctionDef):
        return [_signature(node, named.name), *_docstring(node), where]
    if not isinstance(node, ast.ClassDef):
        return [_block(ast.unparse(node)), where]
    bases = ", ".join(map(ast.unparse, node.bases))
    parts = [_block(f"class {node.name}({bases})" if bases else f"class {node.name}"), *_docstring(node), where]
    fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
    if fields:
        parts.append(_block("\n".join(map(ast.unparse, fields))))
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and (item.name in _SHOWN or not item.name.startswith("_")):
            is_property = any(ast.unparse(mark).endswith("property") for mark in item.decorator_list)
            title = f"### {node.name}.{item.name}" + (" (property)" if is_property else "")
            parts += [title, _signature(item, item.name), *_docstring(item)]
    return parts


def _signature(node: ast.FunctionDef, name: str) -> str:
    """Return `name(...) -> type`, one argument a line where it is long; without self."""
    inputs = node.args
    positional = [arg for arg in (*inputs.posonlyargs, *inputs.args) if arg.arg not in ("self", "cls")]
    defaults = [None] * (len(positional) - len(inputs.defaults)) + list(inputs.defaults)
    rows = [_argument(arg, default) for arg, default in zip(positional, defaults, strict=True)]
    if inputs.vararg:
        rows.append("*" + _argument(inputs.vararg, None))
    elif inputs.kwonlyargs:
        rows.append("*")
    rows += [_argument(arg, value) for arg, value in zip(inputs.kwonlyargs, inputs.kw_defaults, strict=True)]
    if inputs.kwarg:
        rows.append("**" + _argument(inputs.kwarg, None))
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    line = f"{name}({', '.join(rows)}){returns}"
    if len(line) <= 100:
        return _block(line)
    return _block(f"{name}(\n" + "".join(f"    {row},\n" for row in rows) + f"){returns}")


def _argument(arg: ast.arg, default: ast.expr | None) -> str:
    equals = " = " if arg.annotation else "="
    text = arg.arg + (f": {ast.unparse(arg.annotation)}" if arg.annotation else "")
    return text + (f"{equals}{ast.unparse(default)}" if default is not None else "")


def _docstring(node: ast.FunctionDef | ast.ClassDef) -> list[str]:
    """Return the docstring as Markdown; indented parts and examples stand in blocks."""
    text = ast.get_docstring(node)
    if text is None:
        return []
    parts = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        lines = paragraph.splitlines()
        if all(line.startswith("    ") for line in lines):
            parts.append("```text\n" + inspect.cleandoc("\n" + paragraph) + "\n```")
        else:
            parts.append(paragraph.replace("<", "&lt;"))
    return parts


def _block(text: str) -> str:
    return f"```python\n{text}\n```"
