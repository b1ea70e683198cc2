"""Open an ONNX file with onnxruntime, after checks that the file is one that can only compute.

    FILE.onnx -> its protobuf, without its external data -> tensors, operators, shapes checked -> onnxruntime -> Graph

The file is untrusted. onnxruntime would read external data from any path, take the memory that shapes claim, and run
loops without an end.
"""

import math
import os
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maedistill.errors import ConfigError, DataError
from maedistill.weights.from_file import why_unreadable
from maedistill.weights.graph import MOST_NUMBERS, Graph, GraphInput

TO_RUN = ("onnx", "onnxruntime")
TO_WRITE = (*TO_RUN, "onnxscript")
_FORMATS = {"int8": {2, 3}, "fp16": {10}, "bf16": {16}}  # of weights, as onnx.TensorProto numbers them
_DOMAINS = ("", "ai.onnx", "com.microsoft")  # the standard's, and onnxruntime's own


def require_onnx(*packages: str) -> None:
    """Raise ConfigError if one of these optional packages is missing."""
    for package in packages:
        try:
            import_module(package)
        except ImportError as error:
            raise ConfigError(
                f"ONNX needs packages that are not installed ({package})", "pip install 'maedistill[onnx]'"
            ) from error


def open_onnx(path: Path) -> Graph:
    """Open an ONNX graph of one image input and one output. Raises DataError for an invalid or unsafe file."""
    require_onnx(*TO_RUN)
    import onnxruntime

    try:
        data = path.read_bytes()
        require_onnx_format(path, data)
        model = read_checked(data, path.parent)
        takes = _input(model)
        outside = {
            path.parent / entry.value
            for tensor in _tensors(model.graph)
            if tensor.data_location == tensor.EXTERNAL
            for entry in tensor.external_data
            if entry.key == "location"
        }
        outside_bytes = sum(file.stat().st_size for file in outside)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
        options.log_severity_level = 4  # errors are raised
        providers = ["CPUExecutionProvider"]
        given = path if outside else data  # the bytes that were checked; only a path leads to data beside the file
        session = onnxruntime.InferenceSession(given, options, providers=providers, enable_fallback=0)
    except Exception as error:  # onnxruntime and protobuf have kinds of their own, without a common base
        raise DataError(
            f"{path} cannot be opened as ONNX ({why_unreadable(error)})",
            "export the network again, e.g. maedistill export RUN --format onnx",
        ) from error
    name = model.graph.input[0].name

    def run(images: Tensor) -> Tensor:
        try:
            return torch.from_numpy(session.run(None, {name: images.numpy()})[0])
        except Exception as error:
            raise RuntimeError(str(error)) from error

    numbers = sum(math.prod(tensor.dims) for tensor in model.graph.initializer)
    return Graph(run, takes, num_numbers=numbers, precision=_precision(model.graph), outside_bytes=outside_bytes)


def require_onnx_format(path: Path, data: bytes) -> None:
    """Raise ValueError for what onnxruntime would read as its own format, which is not checked here."""
    if path.suffix.lower() != ".onnx" or data[4:8] == b"ORTM":
        raise ValueError("it is not named NAME.onnx, or it is of onnxruntime's own format, ORT")


def read_checked(data: bytes, folder: Path) -> Any:
    """Return the ModelProto of a file, without its external data. Raises ValueError for what could harm."""
    import onnx

    model = onnx.ModelProto.FromString(data)
    if model.functions:
        raise ValueError("it has functions of its own, which must be inlined")
    for node in model.graph.node:  # loops have inner graphs
        has_graph = any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute)
        if node.domain not in _DOMAINS or has_graph:
            raise ValueError(
                f"it has the operator {node.op_type[:60]!r} of {node.domain[:60] or 'ONNX'}, not a network's"
            )
    for tensor in _tensors(model.graph):
        _check_tensor(tensor, folder)
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)  # of shapes that are computed, as well
    for value in (*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output):
        numbers = math.prod(dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim)
        if not 0 <= numbers <= MOST_NUMBERS:
            raise ValueError(f"{value.name[:60]!r} would have {numbers:,} numbers, more than {MOST_NUMBERS:,}")
    return model


def _input(model: Any) -> GraphInput:
    """Return what the graph takes. Raises ValueError unless it is images, in batches of any number."""
    import onnx

    graph, dtypes = model.graph, {onnx.TensorProto.FLOAT: torch.float32, onnx.TensorProto.UINT8: torch.uint8}
    if (len(graph.input), len(graph.output)) != (1, 1):
        raise ValueError(f"it has {len(graph.input)} inputs and {len(graph.output)} outputs, not one each")
    tensor = graph.input[0].type.tensor_type
    return GraphInput.of([dim.dim_value or None for dim in tensor.shape.dim], dtypes.get(tensor.elem_type))


def _precision(graph: Any) -> str:
    """Return the number format of the weights: the first of _FORMATS in which there is a matrix."""
    kinds = {tensor.data_type for tensor in _tensors(graph) if len(tensor.dims) > 1}
    if any(node.op_type == "DequantizeLinear" for node in graph.node):
        return "int8"
    return next((name for name, numbers in _FORMATS.items() if kinds & numbers), "fp32")


def _check_tensor(tensor: Any, folder: Path) -> None:
    """Raise ValueError for external data outside of the folder, or for more numbers than there are bytes for."""
    import onnx

    size = tensor.ByteSize()
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        root, file = os.path.realpath(folder), os.path.realpath(folder / entries.get("location", ""))
        if os.path.dirname(file) != root or not os.path.isfile(file):
            raise ValueError(
                f"the data of {tensor.name[:60]!r} is said to be in {file[:200]!r}, no file beside the graph"
            )
        start = int(entries.get("offset", 0))
        size = int(entries.get("length", os.path.getsize(file) - start))
        if not 0 <= start <= start + size <= os.path.getsize(file):
            raise ValueError(f"the data of {tensor.name[:60]!r} is said to be beyond the end of {file[:200]!r}")
    if not 0 <= math.prod(tensor.dims) <= 2 * size:  # the smallest format has two numbers a byte
        raise ValueError(f"{tensor.name[:60]!r} of {list(tensor.dims)} is said to be in {size:,} bytes")


def _tensors(graph: Any) -> Iterator[Any]:
    """Iterate over all tensors that a graph without inner graphs holds."""
    yield from graph.initializer
    sparse = list(graph.sparse_initializer)
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        yield from (*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors)
        sparse += [
            *([attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []),
            *attribute.sparse_tensors,
        ]
    for tensor in sparse:
        if math.prod(tensor.dims) > MOST_NUMBERS:
            raise ValueError(f"a sparse tensor of {list(tensor.dims)} has more than {MOST_NUMBERS:,} numbers")
        yield from (tensor.values, tensor.indices)
