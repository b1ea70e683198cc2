"""Open a file of torch.export: read its graph, and run it operator by operator from a list of harmless ones.

    FILE.pt2 -> the entries of its zip -> graph as JSON, weights as bytes -> shapes tried on the meta device -> Graph

The file is untrusted, and `torch.export.load` trusts it: it unpickles, imports what a tree names, evaluates the text of
shapes and guards, and compiles names into Python. Here text is compared with lists, and nothing else is done with it.

    b batch   s image side   C outputs
"""

import json
import math
import operator
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maedistill.errors import DataError
from maedistill.weights.from_file import READ_ERRORS, require_honest_zip, why_unreadable
from maedistill.weights.graph import MOST_NUMBERS, Graph, GraphInput

# Of evaluation: none reads or writes a file, or draws random numbers.
_OPERATORS = """
_upsample_bicubic2d_aa.vec abs.default adaptive_avg_pool1d.default adaptive_avg_pool2d.default
adaptive_max_pool2d.default add.Tensor add_.Tensor addmm.default alias.default amax.default arange.default
arange.start arange.start_step avg_pool2d.default baddbmm.default batch_norm.default bmm.default cat.default
chunk.default clamp.default clone.default contiguous.default conv1d.default conv2d.default cos.default detach.default
div.Tensor dropout.default einsum.default elu.default exp.default expand.default expand_as.default flatten.using_ints
flip.default gelu.default group_norm.default hardsigmoid.default hardswish.default hardswish_.default hardtanh.default
hardtanh_.default layer_norm.default leaky_relu.default linear.default log_softmax.int matmul.default
max_pool2d.default maximum.default mean.default mean.dim meshgrid.indexing minimum.default mm.default movedim.int
mul.Tensor mul_.Tensor narrow.default neg.default permute.default pow.Tensor_Scalar reciprocal.default relu.default
relu6.default relu_.default repeat_interleave.self_int reshape.default rms_norm.default roll.default rsqrt.default
rsub.Scalar scaled_dot_product_attention.default select.int sigmoid.default sigmoid_.default silu.default
silu_.default sin.default slice.Tensor softmax.int softplus.default split.Tensor split_with_sizes.default sqrt.default
square.default squeeze.default squeeze.dim squeeze.dims stack.default std.correction sub.Tensor sub_.Tensor
sum.default sum.dim_IntList sym_size.int t.default tanh.default to.device to.dtype to.dtype_layout transpose.int
type_as.default unbind.int unflatten.int unsqueeze.default var.correction var_mean.correction view.default
"""
_OF_TENSORS = {f"torch.ops.aten.{name}": name for name in _OPERATORS.split()}
_OF_SIZES = {f"_operator.{name}": name for name in ("add", "sub", "mul", "floordiv", "mod", "neg")}
_INTO_PARTS = {"unbind": 0, "split": 1, "chunk": 1}  # and how many arguments stand between the tensor and its dimension
_TYPES = {
    1: torch.uint8,
    4: torch.int32,
    5: torch.int64,
    7: torch.float32,
    12: torch.bool,
}  # of torch's schema, by number
_TEXTS = ("none", "tanh", "mean", "floor", "trunc", "ij", "xy")  # arguments of gelu, div, meshgrid ...
_PLAIN = {"as_int": int, "as_float": float, "as_bool": bool}
_FIXED = {"as_none": None, "as_layout": torch.strided, "as_memory_format": None}  # whatever is stated
_MOST_NODES = 100_000  # operators, and parts that one of them makes
_MOST_SIZE = 2**63  # the product of 60 squarings has 2**60 digits


@dataclass(frozen=True)
class _Step:
    """One operator. args, keywords: as in the file, see `_value`. outputs: names, in a list if it gives a list.

    spent: names that no later step reads.
    """

    function: Callable[..., Any]
    args: Sequence[Mapping[str, Any]]
    keywords: Mapping[str, Mapping[str, Any]]
    outputs: str | list[str]
    spent: Sequence[str] = ()


@dataclass(frozen=True)
class _Program:
    """A graph that runs. weights: by the names that the steps use. image, result: the names of input and output."""

    steps: Sequence[_Step]
    weights: Mapping[str, Tensor]
    image: str
    result: str

    def run(self, images: Tensor, *, most: int | None = None) -> Tensor:
        """Return the output of images [b, 3, s, s]. Raises ValueError for a tensor of more than `most` numbers."""
        values: dict[str, Any] = {**self.weights, self.image: images}
        with images.device:  # where operators make tensors, whatever device the file names
            for step in self.steps:
                keywords = {name: _value(given, values) for name, given in step.keywords.items()}
                result = step.function(*(_value(given, values) for given in step.args), **keywords)
                names, results = (
                    ([step.outputs], [result]) if isinstance(step.outputs, str) else (step.outputs, list(result))
                )
                values |= dict(zip(names, results, strict=True))
                for name in step.spent:
                    del values[name]
                sizes = [one.numel() for one in results if isinstance(one, Tensor)]
                if most is not None and max(sizes, default=0) > most:
                    raise ValueError(f"{names[0][:60]!r} would have {max(sizes):,} numbers, more than {most:,}")
        output: Tensor = values[self.result]
        return output


def open_torch_export(path: Path) -> Graph:
    """Open a graph of one image input and one output. Raises DataError for an invalid or unsafe file."""
    try:
        require_honest_zip(path)
        with zipfile.ZipFile(path) as archive:
            program, takes = _read(archive)
        # Shapes alone, which take no memory, show what an operator would make.
        empty = {name: weight.to("meta") for name, weight in program.weights.items()}
        kind = torch.uint8 if takes.pixels else torch.float32
        images = torch.empty(1, 3, takes.side or 224, takes.side or 224, dtype=kind, device="meta")
        with torch.no_grad():
            replace(program, weights=empty).run(images, most=MOST_NUMBERS)
    except (zipfile.LargeZipFile, RecursionError, *READ_ERRORS) as error:
        raise DataError(
            f"{path} cannot be opened as a graph of torch.export ({why_unreadable(error)})",
            "export the network again, e.g. maedistill export RUN --format torch_export, with this version of torch",
        ) from error
    return Graph(program.run, takes, num_numbers=sum(weight.numel() for weight in program.weights.values()))


def _read(archive: zipfile.ZipFile) -> tuple[_Program, GraphInput]:
    """Read the program of an archive, and what it takes. Raises ValueError for what no network has."""
    root = archive.namelist()[0].partition("/")[0]
    content = json.loads(_entry(archive, f"{root}/models/model.json"))["graph_module"]
    graph, signature = content["graph"], content["signature"]
    stored = _stored(archive, f"{root}/data/weights", "model_weights_config.json")
    stored |= _stored(archive, f"{root}/data/constants", "model_constants_config.json")
    weights, images = {}, []
    for [[kind, spec]] in (entry.items() for entry in signature["input_specs"]):
        if kind == "user_input":
            images.append(spec["arg"]["as_tensor"]["name"])
        else:
            weights[spec["arg"]["name"]] = stored[spec[f"{kind}_name"]]
    results = [spec["user_output"]["arg"]["as_tensor"]["name"] for spec in signature["output_specs"]]
    if (len(images), len(results)) != (1, 1):
        raise ValueError(f"it has {len(images)} inputs and {len(results)} outputs, not one each")
    if len(graph["nodes"]) > _MOST_NODES:
        raise ValueError(f"it has {len(graph['nodes']):,} operators, more than {_MOST_NODES:,}")
    steps = [_step(node) for node in graph["nodes"] if node["outputs"]]  # one without an output asserts something
    needed = {results[0]}
    for i, step in reversed([*enumerate(steps)]):
        outputs = {step.outputs} if isinstance(step.outputs, str) else {*step.outputs}
        used = outputs | {*_names([step.args, step.keywords])}
        steps[i] = replace(step, spent=[*(used - needed)])
        needed |= used
    meta = graph["tensor_values"][images[0]]
    takes = GraphInput.of([size.get("as_int") for size in meta["sizes"]], _TYPES.get(meta["dtype"]))
    return _Program(steps, weights, images[0], results[0]), takes


def _entry(archive: zipfile.ZipFile, name: str) -> bytes:
    """Return an entry, stored as it is: a compressed one could be of any size."""
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name[:100]!r} is compressed")
    return archive.read(name)


def _stored(archive: zipfile.ZipFile, folder: str, config: str) -> dict[str, Tensor]:
    """Read the tensors of a folder of the archive by their names in the network."""
    files: dict[tuple[str, int], Tensor] = {}
    tensors = {}
    for name, entry in json.loads(_entry(archive, f"{folder}/{config}"))["config"].items():
        if entry["use_pickle"]:
            raise ValueError(f"{name[:60]!r} is pickled")
        meta, file = entry["tensor_meta"], (entry["path_name"], entry["tensor_meta"]["dtype"])
        sizes, strides = ([_whole(size) for size in meta[key]] for key in ("sizes", "strides"))
        if math.prod(sizes) > MOST_NUMBERS:
            raise ValueError(f"{name[:60]!r} has {math.prod(sizes):,} numbers, more than {MOST_NUMBERS:,}")
        if file not in files:
            content = bytearray(_entry(archive, f"{folder}/{file[0]}"))
            dtype = _TYPES[file[1]]
            files[file] = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        tensors[name] = files[file].as_strided(sizes, strides, _whole(meta["storage_offset"]))
    return tensors


def _step(node: Mapping[str, Any]) -> _Step:
    """Read an operator. Raises ValueError for one that is not listed, or for arguments of another kind."""
    target = node["target"]
    if target in _OF_TENSORS:
        name, _, overload = _OF_TENSORS[target].partition(".")
        function = getattr(getattr(torch.ops.aten, name), overload)
        if name in _INTO_PARTS:
            function = _with_few_parts(function, _INTO_PARTS[name])
    elif target in _OF_SIZES:
        function = _with_small_sizes(getattr(operator, _OF_SIZES[target]))
    else:
        raise ValueError(f"its operator {str(target)[:100]!r} is none of a network's")
    if len(node["outputs"]) != 1:
        outputs: str | list[str] = [_output(entry) for entry in node["outputs"]]
    elif "as_tensors" in node["outputs"][0]:
        outputs = [entry["name"] for entry in node["outputs"][0]["as_tensors"]]
    else:
        outputs = _output(node["outputs"][0])
    by_place = [entry["arg"] for entry in node["inputs"] if entry["kind"] == 1]
    by_name = {entry["name"]: entry["arg"] for entry in node["inputs"] if entry["kind"] != 1}
    if target.startswith("torch.ops.aten.arange."):  # it has no tensor to follow
        by_name["device"] = {"as_device": None}
    return _Step(function, by_place, by_name, outputs)


def _with_small_sizes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of numbers that raises ValueError for anything else, and for a result that is no size."""

    def checked(*sizes: Any) -> Any:
        if not all(isinstance(size, int | float) for size in sizes):
            raise ValueError("a size is computed from something that is no number")
        result = function(*sizes)
        if not abs(result) < _MOST_SIZE:
            raise ValueError("a size is computed that no tensor has")
        return result

    return checked


def _with_few_parts(function: Callable[..., Any], place: int) -> Callable[..., Any]:
    """Return an operator that raises ValueError for a tensor which it could divide into very many."""

    def checked(tensor: Tensor, *given: Any, **named: Any) -> Any:
        size = tensor.shape[named.get("dim", given[place] if len(given) > place else 0)]
        if size > _MOST_NODES:
            raise ValueError(f"a tensor would be divided along {size:,} numbers, more than {_MOST_NODES:,}")
        return function(tensor, *given, **named)

    return checked


def _output(entry: Mapping[str, Any]) -> str:
    """Return the name of a tensor or of a size."""
    [[kind, value]] = entry.items()
    name: str = value["as_name"] if kind == "as_sym_int" else value["name"]
    return name


def _value(given: Mapping[str, Any], values: Mapping[str, Any]) -> Any:
    """Return an argument: a tensor or a size by its name, or a plain value. Raises ValueError for any other kind."""
    [[kind, value]] = given.items()
    if kind in ("as_tensor", "as_sym_int", "as_optional_tensor"):
        return _named(value, values)
    if kind in ("as_tensors", "as_sym_ints", "as_optional_tensors"):
        return [_named(entry, values) for entry in value]
    if kind in _FIXED:
        return _FIXED[kind]
    if kind == "as_device":
        return torch.get_default_device()
    if kind == "as_scalar_type":
        return _TYPES[value]
    if kind == "as_string" and value in _TEXTS:
        return value
    if kind in _PLAIN:
        return _PLAIN[kind](value)
    if kind.removesuffix("s") in _PLAIN:
        return [_PLAIN[kind.removesuffix("s")](one) for one in value]
    raise ValueError(f"an argument is {kind[:30]!r} {str(value)[:60]!r}, none of a network's")


def _names(given: Any) -> Iterator[str]:
    """Iterate over the names in arguments."""
    if isinstance(given, Mapping):
        yield from (given[key] for key in ("name", "as_name") if isinstance(given.get(key), str))
    for value in given.values() if isinstance(given, Mapping) else given if isinstance(given, list | tuple) else ():
        yield from _names(value)


def _named(entry: Mapping[str, Any], values: Mapping[str, Any]) -> Any:
    """Return the value of a name, or a whole number, or None."""
    [[kind, value]] = entry.items()
    if kind == "as_tensor":
        return _named(value, values)
    if kind in ("name", "as_name"):
        return values[value]
    return {"as_int": int(value), "as_none": None}[kind]


def _whole(entry: Mapping[str, int]) -> int:
    """Return a stated size, stride or offset. Raises ValueError for one that is none."""
    size = entry["as_int"]
    if not 0 <= size <= MOST_NUMBERS:
        raise ValueError(f"a size of a tensor is {size!r}")
    return size
