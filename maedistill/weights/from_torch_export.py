"""Open a file of torch.export with torch, after checks that it holds a graph of torch's own operators and no code.

    FILE.pt2 -> the entries of its zip, its graph as JSON -> every string checked -> torch.export.load -> Graph

The file is untrusted, and torch trusts it: it unpickles what does not load otherwise, evaluates the text of shapes and
guards, compiles names into Python, and looks up the functions of a graph in all of torch.
"""

import io
import json
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from maedistill.errors import DataError
from maedistill.weights.from_file import READ_ERRORS, require_honest_zip, why_unreadable
from maedistill.weights.graph import MOST_NUMBERS, Graph, GraphInput

_ENTRY = re.compile(
    r"[^/]+/(archive_format|archive_version|byteorder|version|\.data/(version|serialization_id)|models/model\.json"
    r"|data/(weights|constants)/(model_\w+_config\.json|\w+)|data/sample_inputs/model\.pt)"
)
_OPERATOR = re.compile(  # of tensors, and of the arithmetic of shapes; `from_file` opens files
    r"torch\.ops\.aten\.(?!__|from_file)\w+\.(?!__)\w+|_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|neg|eq|ne|[gl][et])"
)
_NAME = re.compile(r"[\w.]*")
_SYMBOL = re.compile(  # Mul(Integer(4), Symbol('s77', positive=True, integer=True))
    r"(Symbol\('\w+'|(Integer|Mul|Add|Max|Min|Mod|FloorDiv)\(|(positive|integer|nonnegative)=True|\d+|[-+*), ])*"
)
_TREE_TYPES = {None, "builtins.tuple", "builtins.list", "builtins.dict"}
_TO_THE_END = 2**63 - 1  # of a slice
_FREE_TEXT = ("metadata", "torch_version")  # of nodes: where their code stood; torch does not run it


def open_torch_export(path: Path) -> Graph:
    """Open a graph of one image input and one output. Raises DataError for a file that is none, or is unsafe."""
    try:
        require_honest_zip(path)
        _check(path)
        program = torch.export.load(path)
        takes = _input(program)
        module = program.module()
    except (zipfile.LargeZipFile, *READ_ERRORS) as error:
        raise DataError(
            f"{path} cannot be opened as a graph of torch.export ({why_unreadable(error)})",
            "export the network again, e.g. maedistill export RUN --format torch_export, with this version of torch",
        ) from error
    return Graph(lambda images: module(images), takes, num_numbers=sum(t.numel() for t in program.state_dict.values()))


def _input(program: torch.export.ExportedProgram) -> GraphInput:
    """Return what the graph takes. Raises ValueError unless it is images, in batches of any number."""
    names = program.graph_signature.user_inputs
    values = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    if len(values) != 1 or len(program.graph_signature.user_outputs) != 1:
        raise ValueError(f"it has {len(values)} inputs, and not one input and one output")
    sides = [None if isinstance(side, torch.SymInt) else side for side in values[0].shape]
    kinds = (torch.float32, torch.uint8)
    if len(sides) != 4 or sides[:2] != [None, 3] or sides[2] != sides[3] or values[0].dtype not in kinds:
        shape = " x ".join(str(side or "any") for side in sides)
        raise ValueError(f"it takes {shape}, not any number of square images of float32 or uint8: any x 3 x s x s")
    return GraphInput(sides[2], values[0].dtype == torch.uint8)


def _check(path: Path) -> None:
    """Raise ValueError for anything that a graph of tensors does not need."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        strange = [name for name, count in Counter(names).items() if count > 1 or not _ENTRY.fullmatch(name)]
        if strange:
            raise ValueError(f"it holds {strange[0][:100]!r}, which is no part of a graph")
        root = names[0].partition("/")[0]
        for part in ("weights", "constants"):
            config = json.loads(archive.read(f"{root}/data/{part}/model_{part}_config.json"))
            if any(entry["use_pickle"] for entry in config["config"].values()):
                raise ValueError(f"its {part} are pickled")
        inputs = archive.read(f"{root}/data/sample_inputs/model.pt")
        torch.load(io.BytesIO(inputs), weights_only=True)  # else torch would run them as a pickle
        graph = json.loads(archive.read(f"{root}/models/model.json"))
    if graph["guards_code"]:
        raise ValueError("it holds guards, which are Python code")
    for key, value in _values(graph):
        _check_value(key, value)


def _check_value(key: str, value: object) -> None:
    """Raise ValueError for text that torch would run, and for sizes that no network has."""
    if isinstance(value, int) and MOST_NUMBERS < value < _TO_THE_END and key in ("as_int", "as_ints", "sizes"):
        raise ValueError(f"a size of {value:,} is more than {MOST_NUMBERS:,}")
    if not isinstance(value, str):
        return
    if key in ("in_spec", "out_spec"):
        kinds = {entry for name, entry in _values(json.loads(value)) if name == "type"}
        if not kinds <= _TREE_TYPES:
            raise ValueError(f"its inputs are of other types than lists: {kinds - _TREE_TYPES}")
    elif not {"target": _OPERATOR, "expr_str": _SYMBOL}.get(key, _NAME).fullmatch(value):
        raise ValueError(f"{key} is {value[:100]!r}, no part of a graph of tensors")


def _values(entry: object, key: str = "") -> Iterator[tuple[str, Any]]:
    """Iterate over all keys and plain values of nested JSON, a key being a value as well."""
    if isinstance(entry, dict):
        for name, value in entry.items():
            yield "", name
            if name not in _FREE_TEXT:
                yield from _values(value, name)
    elif isinstance(entry, list):
        for value in entry:
            yield from _values(value, key)
    else:
        yield key, entry
