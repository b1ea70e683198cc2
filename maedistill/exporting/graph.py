"""Write a network as a graph that runs without timm, for any number of images: ONNX or torch.export.

network -> (scaling and normalisation before it) -> one traced program -> model.onnx, model.pt2
the written file -> opened as `maedistill evaluate` opens it -> compared with the network in fp32, or an error

b batch   s image side   C outputs   D width
"""

import ast
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from maedistill.data.images.transforms import normalize, to_float01
from maedistill.errors import ConfigError, DataError
from maedistill.evaluation.full_pass import evaluation_mode
from maedistill.weights.from_graph import OPENERS, Preprocessing

LAYERS = ("Conv", "MatMul", "Gemm")  # of ONNX, if they have weights
GRAPH_FILES = {"onnx": "model.onnx", "torch_export": "model.pt2"}
_MOST_APART = 1e-4  # of the largest output
_MOST_BYTES = 2 * 10**9  # of weights in one ONNX file: a protobuf ends at 2**31, with the graph
_IMAGES = 3  # of random pixels, for the comparison
_SCOPES = "pkg.torch.onnx.name_scopes"  # of a node: the modules that it comes from


class WithPreprocessing(nn.Module):
    """A network with scaling and normalisation before it: pixels uint8 [b, 3, s, s] -> [b, C]."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, stated: Preprocessing) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(stated.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(stated.std).view(3, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the network's outputs."""
        return self.network(normalize(pixels.float() / 255, self.mean, self.std))


def write_graphs(kinds: Sequence[str], network: nn.Module, folder: Path, stated: Preprocessing) -> dict[str, float]:
    """Write a network as graphs, of kinds of `GRAPH_FILES`; return by kind how far their outputs are from its own.

    stated: its preprocessing, which becomes part of the graphs if their input is uint8. The distance is the largest
    one, as a share of the largest output. Raises DataError if it is above 1e-4, or if torch cannot write a graph;
    ConfigError for ONNX of more than 2 GB.
    """
    if "onnx" in kinds:
        size = sum(tensor.nbytes for tensor in network.state_dict().values())
        if size > _MOST_BYTES:
            raise ConfigError(
                f"the network has {size / 1e9:.1f} GB of weights, and one ONNX file holds at most 2 GB",
                "export it as timm or torch_export: --format timm,torch_export, without --int8",
            )
    with evaluation_mode(network):
        try:
            program = _trace(network, stated)
            for kind in kinds:
                (_write_onnx if kind == "onnx" else torch.export.save)(program, folder / GRAPH_FILES[kind])
        except (RuntimeError, ValueError, TypeError, AssertionError, LookupError, AttributeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise DataError(
                f"torch {torch.__version__} cannot write this network as a graph ({type(error).__name__}: {reason})",
                "export it as timm: --format timm",
            ) from error
        return {kind: _distance(kind, network, folder / GRAPH_FILES[kind], stated) for kind in kinds}


def _trace(network: nn.Module, stated: Preprocessing) -> torch.export.ExportedProgram:
    """Return the program of the network for any number of images, without the paths of this machine."""
    inside = stated.input == "uint8"
    module = WithPreprocessing(network, stated).eval() if inside else network
    images = torch.zeros(2, 3, stated.size, stated.size, dtype=torch.uint8 if inside else torch.float32)
    with torch.no_grad():
        program = torch.export.export(module, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def _write_onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write a program as ONNX, in one file, with layers that have the names of their modules."""
    written = torch.onnx.export(
        program, dynamo=True, input_names=["images"], output_names=["output"], external_data=False, verbose=False
    )
    assert written is not None
    model = written.model_proto
    free = model.graph.input[0].type.tensor_type.shape.dim[0].dim_param  # s77
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == free:
                dim.dim_param = "batch"
        del value.metadata_props[:]
    taken = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        scopes = [ast.literal_eval(entry.value) for entry in node.metadata_props if entry.key == _SCOPES]
        module = next(iter(scopes), ["", ""])[-2]
        if node.op_type in LAYERS and node.input[1] in taken and module not in taken:
            taken.add(module)
            node.name = module
        del node.metadata_props[:]
    path.write_bytes(model.SerializeToString())


@torch.no_grad()
def _distance(kind: str, network: nn.Module, path: Path, stated: Preprocessing) -> float:
    """Return how far the outputs of a written graph are from the network's. Raises DataError above 1e-4."""
    graph = OPENERS[kind](path)
    shape = (_IMAGES, 3, stated.size, stated.size)
    pixels = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (stated.mean, stated.std))
    images = normalize(to_float01(pixels), mean, std)  # [b, 3, s, s]
    inputs = pixels.float() if stated.input == "uint8" else images
    expected = network(images)  # [b, C]
    given = torch.cat([graph(inputs), graph(inputs[:1])])  # two numbers of images
    distance = float((given - torch.cat([expected, expected[:1]])).abs().max() / expected.abs().max())
    if not distance <= _MOST_APART:  # `not <=` also catches nan
        raise DataError(
            f"the outputs of {path.name} differ from the network's by {distance:.2g} of the largest one, more than "
            f"{_MOST_APART:g}",
            "export it as timm (--format timm), or with other versions of torch, onnxscript and onnxruntime",
        )
    return distance
