"""Graphs of strangers: what could harm is refused before onnxruntime or torch open the file, in two lines."""

import io
import json
import os
import resource
import zipfile
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from maedistill.errors import UserError
from maedistill.weights.open_network import open_network

VIEW = {"size": 4, "crop": 1.0, "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3}
IMAGES = ["batch", 3, 4, 4]


def weights(dims=(48, 2)) -> onnx.TensorProto:
    tensor = numpy_helper.from_array(np.arange(96, dtype=np.float32).reshape(48, 2), "weights")
    del tensor.dims[:]
    tensor.dims.extend(dims)
    return tensor


def external(location: str, **entries: int) -> onnx.TensorProto:
    tensor = TensorProto(name="weights", data_type=TensorProto.FLOAT, dims=[48, 2])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def linear(
    *more, shape=IMAGES, kind=TensorProto.FLOAT, tensor=None, inputs=1, functions=(), domain=""
) -> onnx.ModelProto:
    """Two outputs of an image's 48 numbers, and what else a stranger has put in."""
    nodes = [helper.make_node("Flatten", ["images"], ["rows"]), *more]
    nodes.append(helper.make_node("MatMul", ["rows", "weights"], ["output"]))
    taken = [helper.make_tensor_value_info(f"images{i or ''}", kind, shape) for i in range(inputs)]
    given = [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 2])]
    graph = helper.make_graph(nodes, "graph", taken, given, [weights() if tensor is None else tensor])
    opsets = [helper.make_opsetid("", 20), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10)


def loop() -> onnx.NodeProto:
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("on", TensorProto.BOOL, [])],
    )
    return helper.make_node("Loop", ["", "endless"], [], body=body)


def huge_zeros() -> list[onnx.NodeProto]:
    """A terabyte of zeros, whose shape is computed."""
    side = numpy_helper.from_array(np.array([1000, 1000], np.int64))
    return [
        helper.make_node("Constant", [], ["side"], value=side),
        helper.make_node("Concat", ["side", "side"], ["shape"], axis=0),
        helper.make_node("ConstantOfShape", ["shape"], ["zeros"]),
    ]


CALL = helper.make_function(
    "own", "Twice", ["x"], ["y"], [helper.make_node("Add", ["x", "x"], ["y"])], [helper.make_opsetid("", 20)]
)
HOSTILE = {
    "outside": (linear(tensor=external("../secret.bin")), "no file beside the graph"),
    "absolute": (linear(tensor=external("/etc/passwd")), "no file beside the graph"),
    "linked": (linear(tensor=external("link.bin")), "no file beside the graph"),
    "missing": (linear(tensor=external("none.bin")), "no file beside the graph"),
    "beyond the end": (linear(tensor=external("data.bin", offset=380, length=384)), "beyond the end"),
    "more than the file": (linear(tensor=external("data.bin", length=8)), "is said to be in 8 bytes"),
    "hidden in a node": (
        linear(helper.make_node("Constant", [], ["c"], value=external("../secret.bin"))), "no file beside the graph"
    ),
    "huge weights": (linear(tensor=weights(dims=[2**40, 2])), "[1099511627776, 2]"),
    "negative weights": (linear(tensor=weights(dims=[-48, 2])), "[-48, 2]"),
    "huge result": (linear(*huge_zeros()), "'zeros' would have 1,000,000,000,000 numbers"),
    "huge image": (linear(shape=["batch", 3, 2**20, 2**20]), "would have 3,298,534,883,328 numbers"),
    "endless": (linear(loop()), "the operator 'Loop' of ONNX"),
    "other domain": (
        linear(helper.make_node("Shell", ["rows"], ["x"], domain="evil"), domain="evil"), "'Shell' of evil"
    ),
    "unknown operator": (linear(helper.make_node("Nonsense", ["rows"], ["x"])), "Nonsense"),
    "functions": (
        linear(helper.make_node("Twice", ["rows"], ["x"], domain="own"), functions=[CALL], domain="own"), "functions"
    ),
    "two inputs": (linear(inputs=2), "2 inputs and 1 outputs"),
    "one image at a time": (linear(shape=[1, 3, 4, 4]), "it takes 1 x 3 x 4 x 4"),
    "gray": (linear(shape=["batch", 1, 4, 4]), "it takes any x 1 x 4 x 4"),
    "not square": (linear(shape=["batch", 3, 4, 5]), "it takes any x 3 x 4 x 5"),
    "int64": (linear(kind=TensorProto.INT64), "of float32 or uint8"),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path) -> Path:
    """DIR/in with preprocess.json, data, and a link to a secret beside it."""
    inside = tmp_path / "in"
    inside.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(384))
    (inside / "data.bin").write_bytes(np.arange(96, dtype=np.float32).tobytes())
    (inside / "link.bin").symlink_to(tmp_path / "secret.bin")
    (inside / "preprocess.json").write_text(json.dumps(VIEW))
    return inside


def refused(source: str, *causes: str, **options: int) -> None:
    with pytest.raises(UserError) as caught:
        open_network(source, "predictor", **options)
    assert all(cause in caught.value.cause for cause in causes), caught.value.cause
    assert caught.value.remedy and "\n" not in caught.value.cause


def test_a_plain_graph_opens(folder):
    (folder / "model.onnx").write_bytes(linear().SerializeToString())
    network = open_network(str(folder / "model.onnx"), "predictor")
    assert (network.num_classes, network.parameters, network.precision, network.size) == (2, 96, "fp32", 4)
    assert network.file_bytes == (folder / "model.onnx").stat().st_size and network.mean == (0.5, 0.5, 0.5)
    images = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = images.flatten(1) @ torch.arange(96.0).view(48, 2)
    torch.testing.assert_close(network.module(images), expected, rtol=1e-5, atol=1e-3)
    (folder / "model.onnx").write_bytes(linear(tensor=external("data.bin")).SerializeToString())
    outside = open_network(f"onnx:{folder}/model.onnx", "predictor")
    assert outside.file_bytes == (folder / "model.onnx").stat().st_size + 384
    torch.testing.assert_close(outside.module(images), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(("kind", "precision"), [(np.float16, "fp16"), (np.int8, "int8"), (np.uint8, "int8")])
def test_the_number_format_is_that_of_the_weights(folder, kind, precision):
    """Of fp16 with casts around it, and of what onnxruntime's quantize_dynamic writes."""
    model = linear(tensor=numpy_helper.from_array(np.ones((48, 2), kind), "weights"))
    del model.graph.node[1:]
    if kind == np.float16:
        model.graph.node.append(helper.make_node("Cast", ["rows"], ["x"], to=TensorProto.FLOAT16))
        model.graph.node.append(helper.make_node("MatMul", ["x", "weights"], ["y"]))
    else:
        model.graph.node.append(helper.make_node("DynamicQuantizeLinear", ["rows"], ["x", "scale", "zero"]))
        model.graph.node.append(helper.make_node("MatMulInteger", ["x", "weights", "zero"], ["y"]))
    model.graph.node.append(helper.make_node("Cast", ["y"], ["output"], to=TensorProto.FLOAT))
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    assert open_network(f"onnx:{folder}/model.onnx", "predictor").precision == precision


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_onnx_file_is_refused(folder, name):
    model, cause = HOSTILE[name]
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    before = sorted(folder.parent.rglob("*"))
    refused(f"onnx:{folder}/model.onnx", "cannot be opened as ONNX", cause)
    assert sorted(folder.parent.rglob("*")) == before


def test_onnxruntimes_own_format_is_refused(folder):
    """It would be read in place of the protobuf that was checked: by the name, or by bytes 4 to 7."""
    whole = linear().SerializeToString()
    also = b"\x12\x06__ORTM" + whole  # the name of its producer
    assert onnx.ModelProto.FromString(also).graph == onnx.ModelProto.FromString(whole).graph
    for name, content in (("model.ort", whole), ("model.ORT", whole), ("model", whole), ("model.onnx", also)):
        (folder / name).write_bytes(content)
        refused(f"onnx:{folder}/{name}", "cannot be opened as ONNX", "onnxruntime's own format")


def test_files_that_are_no_graph_are_refused(folder):
    whole = linear().SerializeToString()
    for content in (b"", b"<html>", whole[: len(whole) // 2], bytes(1000)):
        (folder / "model.onnx").write_bytes(content)
        (folder / "model.pt2").write_bytes(content)
        refused(f"onnx:{folder}/model.onnx", "cannot be opened as ONNX")
        refused(f"torch_export:{folder}/model.pt2", "cannot be opened as a graph of torch.export")
    refused(f"onnx:{folder}/none.onnx", "no such file")
    refused(f"onnx:{folder}/{'long' * 100}.onnx", "no such file")


@pytest.mark.parametrize(
    ("changed", "options", "cause"),
    [
        (None, {}, "preprocess.json does not describe the graph's images"),
        ({"std": [0.5, 0.0, 0.5]}, {}, "std.1: Input should be greater than 0"),
        ({"crop": 0.005}, {}, "crop: Input should be greater than or equal to 0.1"),
        ({"mean": [0.5, 2.0, 0.5]}, {}, "mean.1: Input should be less than or equal to 1"),
        ({"size": 10**9}, {}, "size: Input should be less than"),
        ({"interpolation": "../x"}, {}, "interpolation"),
        ({"size": 8}, {}, "takes images of 4 pixels, not of 8"),
        ({}, {"image_size": 8}, "takes images of 4 pixels, not of 8"),
        ({"input": "uint8"}, {}, "takes float32, but its preprocess.json says uint8"),
    ],
)
def test_what_does_not_fit_the_graph_is_refused(folder, changed, options, cause):
    (folder / "model.onnx").write_bytes(linear().SerializeToString())
    (folder / "preprocess.json").unlink()
    if changed is not None:
        (folder / "preprocess.json").write_text(json.dumps(VIEW | changed))
    refused(f"onnx:{folder}/model.onnx", cause, **options)


def test_a_graph_of_other_shapes_is_refused(folder):
    """Its batch is called free, but it adds up all images."""
    add = helper.make_node("ReduceSum", ["rows"], ["sum"], keepdims=1)
    (folder / "model.onnx").write_bytes(
        linear(add, helper.make_node("Expand", ["sum", "sum"], ["x"])).SerializeToString()
    )
    refused(f"onnx:{folder}/model.onnx", "cannot be opened as ONNX")
    model = linear()
    model.graph.node[0].CopyFrom(helper.make_node("Reshape", ["images", "one"], ["rows"]))
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 48], np.int64), "one"))
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    refused(f"onnx:{folder}/model.onnx", "cannot run on 2 images of 4 pixels")


def test_a_graph_trains_nothing(folder):
    (folder / "model.onnx").write_bytes(linear().SerializeToString())
    for use in ("encoder", "classifier", "any"):
        with pytest.raises(UserError, match="is of a kind that cannot be used here"):
            open_network(f"onnx:{folder}/model.onnx", use)


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("program") / "model.pt2"
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 2)).eval()
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    torch.export.save(torch.export.export(network, (torch.zeros(2, 3, 4, 4),), dynamic_shapes=shapes), path)
    return path.read_bytes()


def rewritten(data: bytes, path: Path, changes: dict[str, bytes]) -> None:
    """Write an archive with other entries in place of some, or in addition."""
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(path, "w") as new:
        root = old.namelist()[0].partition("/")[0]
        entries = {name: old.read(name) for name in old.namelist()}
        for name, content in (entries | {f"{root}/{name}": content for name, content in changes.items()}).items():
            new.writestr(name, content)


def entry(data: bytes, name: str) -> dict:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        root = archive.namelist()[0].partition("/")[0]
        return json.loads(archive.read(f"{root}/{name}"))


def pickled(path: Path) -> bytes:
    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {path}",)

    buffer = io.BytesIO()
    torch.save(Payload(), buffer)
    return buffer.getvalue()


GRAPH = "models/model.json"
WEIGHTS, CONSTANTS = "data/weights/model_weights_config.json", "data/constants/model_constants_config.json"
TARGETS = (
    "torch.hub.load",
    "torch.ops.aten.from_file.default",
    "torch.ops.aten.save.default",
    "torch.ops.aten.set_.source_Storage",
    "_operator.call",
    "torch.ops.aten.__class__.mro",
    "math.exp",
)


def node(target: str, *args: dict, output: str) -> dict:
    inputs = [{"name": f"a{i}", "arg": arg, "kind": 1} for i, arg in enumerate(args)]
    return {"target": target, "inputs": inputs, "outputs": [{"as_tensor": {"name": output}}], "metadata": {}}


def huge_sum(nodes: list[dict]) -> None:
    """A sum of 2^40 numbers, whose parts are views of one number each."""
    one = [{"as_int": 1}, {"as_int": 0}, {"as_int": 1}]
    nodes.append(node("torch.ops.aten.slice.Tensor", {"as_tensor": {"name": "flatten"}}, *one, output="x"))
    nodes.append(
        node("torch.ops.aten.expand.default", {"as_tensor": {"name": "x"}}, {"as_ints": [2**40, 1]}, output="y")
    )
    nodes.append(node("torch.ops.aten.add.Tensor", *[{"as_tensor": {"name": "y"}}] * 2, output="z"))


def sized(target: str, *args: dict, output: str) -> dict:
    return node(target, *args, output=output) | {"outputs": [{"as_sym_int": {"as_name": output}}]}


def digits(nodes: list[dict]) -> None:
    """A size that is squared again and again."""
    nodes.append(sized("_operator.mul", {"as_int": 10}, {"as_int": 10}, output="n0"))
    for i in range(60):
        nodes.append(sized("_operator.mul", *[{"as_sym_int": {"as_name": f"n{i}"}}] * 2, output=f"n{i + 1}"))


def repeated(nodes: list[dict]) -> None:
    nodes.append(sized("_operator.mul", {"as_ints": [0]}, {"as_int": 10**9}, output="n"))


def counted(nodes: list[dict]) -> None:
    """16 GB of numbers on the CPU, whatever the device of other tensors."""
    nodes.append(node("torch.ops.aten.arange.default", {"as_int": 2 * 10**9}, output="x"))
    device = {"name": "device", "arg": {"as_none": True}, "kind": 2}
    nodes[-1]["inputs"].append(device)


def pieces(nodes: list[dict], *, target: str = "unbind.int", args: tuple = ()) -> None:
    """2^28 tensors of one number each."""
    nodes.append(node("torch.ops.aten.arange.default", {"as_int": 2**28}, output="x"))
    nodes.append(node(f"torch.ops.aten.{target}", {"as_tensor": {"name": "x"}}, *args, output="y"))


COSTLY = {
    "digits": (digits, "a size is computed that no tensor has"),
    "repeated": (repeated, "something that is no number"),
    "counted": (counted, "'x' would have 2,000,000,000 numbers"),
    "unbind": (pieces, "would be divided along 268,435,456"),
    "split": (partial(pieces, target="split.Tensor", args=({"as_int": 1}, {"as_int": 0})), "would be divided"),
    "chunk": (partial(pieces, target="chunk.default", args=({"as_int": 2**28},)), "would be divided"),
}


@pytest.mark.parametrize("name", COSTLY)
def test_a_program_that_would_take_memory_is_refused_before_it_does(folder, program, name):
    graph, (add, cause) = entry(program, GRAPH), COSTLY[name]
    nodes = graph["graph_module"]["graph"]["nodes"]
    add(nodes)
    rewritten(program, folder / "model.pt2", {GRAPH: json.dumps(graph).encode()})
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(f"torch_export:{folder}/model.pt2", "cannot be opened as a graph of torch.export", cause)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


@pytest.mark.parametrize(
    "name", [*TARGETS, "text", "function", "huge", "pickled weights", "huge weights", "beyond the end", "two inputs"]
)
def test_a_hostile_program_is_refused(folder, program, name):
    graph, config = entry(program, GRAPH), entry(program, WEIGHTS)
    nodes = graph["graph_module"]["graph"]["nodes"]
    weight = next(iter(config["config"].values()))
    if name in TARGETS:
        nodes[0]["target"], cause = name, f"its operator '{name}' is none of a network's"
    elif name in ("text", "function"):
        given = {"as_string": "__import__('os')"} if name == "text" else {"as_operator": "torch.hub.load"}
        nodes[0]["inputs"][1]["arg"], cause = given, "none of a network's"
    elif name == "huge":
        huge_sum(nodes)
        cause = "'y' would have 1,099,511,627,776 numbers"
    elif name == "pickled weights":
        weight["use_pickle"], cause = True, "is pickled"
    elif name == "huge weights":
        weight["tensor_meta"]["sizes"][0]["as_int"], cause = 2**27, "numbers, more than"
    elif name == "beyond the end":
        weight["tensor_meta"]["storage_offset"]["as_int"], cause = 1, "out of bounds"
    else:
        specs = graph["graph_module"]["signature"]["input_specs"]
        specs.append(specs[-1])
        cause = "2 inputs and 1 outputs"
    rewritten(program, folder / "model.pt2", {GRAPH: json.dumps(graph).encode(), WEIGHTS: json.dumps(config).encode()})
    refused(f"torch_export:{folder}/model.pt2", "cannot be opened as a graph of torch.export", cause)


@pytest.mark.parametrize(
    "name", ["nothing", "guards", "symbol", "argument", "tree", "hidden", "sample inputs", "constants", "library"]
)
def test_what_torch_would_run_is_not_read(folder, program, name):
    """torch.export.load evaluates, imports or unpickles each of these. The graph is as it was without."""
    canary, graph, changes = folder.parent / "canary", entry(program, GRAPH), {}
    module, code = graph["graph_module"], f"__import__('os').system('touch {canary}')"
    signature = module["module_call_graph"][0]["signature"]
    if name == "guards":
        graph["guards_code"] = [f"{code} or True"]
    elif name == "symbol":
        text = json.dumps(module["graph"]["tensor_values"])
        assert "Symbol('s" in text
        module["graph"]["tensor_values"] = json.loads(text.replace("Symbol('s", f"{code} or Symbol('s"))
    elif name == "argument":
        signature["forward_arg_names"] = [f"x={code}"]
    elif name == "tree":
        spec = json.loads(signature["in_spec"])
        spec[1]["context"] = json.dumps({"__enum__": True, "fqn": "ctypes:cdll", "name": f"{folder}/evil.so"})
        signature["in_spec"] = json.dumps(spec)
    elif name == "hidden":
        module["graph"]["tensor_values"]["metadata"] = {"dtype": 7, "sizes": [{"as_expr": {"expr_str": code}}]}
    elif name == "sample inputs":
        changes["data/sample_inputs/model.pt"] = pickled(canary)
    elif name == "constants":
        meta = next(iter(entry(program, WEIGHTS)["config"].values()))["tensor_meta"]
        changes["data/constants/opaque_obj_0"] = pickled(canary) + bytes(-len(pickled(canary)) % 4)
        payload = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": False, "tensor_meta": meta}
        changes[CONSTANTS] = json.dumps({"config": {"x": payload}}).encode()
    elif name == "library":
        changes["data/aotinductor/model/model.so"] = b"\x7fELF"
    rewritten(program, folder / "model.pt2", {GRAPH: json.dumps(graph).encode(), **changes})
    network = open_network(f"torch_export:{folder}/model.pt2", "predictor")
    assert network.num_classes == 2 and network.parameters == 98 and not canary.exists()
    (folder / "whole.pt2").write_bytes(program)
    images = torch.randn(5, 3, 4, 4)
    assert torch.equal(network.module(images), torch.export.load(folder / "whole.pt2").module()(images))
    if name in ("symbol", "sample inputs"):
        with suppress(Exception):
            torch.export.load(folder / "model.pt2")
        assert canary.exists(), "this file does run code where one lets it"


def test_a_compressed_entry_is_refused(folder, program):
    with zipfile.ZipFile(io.BytesIO(program)) as old, zipfile.ZipFile(folder / "model.pt2", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name), zipfile.ZIP_DEFLATED if "weight_0" in name else zipfile.ZIP_STORED)
    refused(f"torch_export:{folder}/model.pt2", "cannot be opened as a graph of torch.export")
