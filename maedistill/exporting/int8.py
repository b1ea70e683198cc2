"""Quantise an ONNX graph to int8 with onnxruntime: static, with calibration images, within a given loss of accuracy.

    model.onnx -> ranges of its activations on calibration images -> the error of each layer when it alone is int8
    all layers in int8 -> top-1 -> too low? the 1, 2, 4, ... layers with the largest error back to float -> top-1 -> ...

A layer is a convolution or a product with weights: weights int8 for each channel, input uint8 for the tensor. What lies
between is float: the residual stream, norms, softmax, activations and the products of attention. int8 ViTs lose their
accuracy at residual additions and at the outputs of the second layer of an MLP, so no output of a layer is quantised.

    n images   s image side
"""

import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from maedistill.data.images.transforms import normalize, to_float01
from maedistill.data.loading.evaluation import EvaluationImages, exact_batches
from maedistill.data.shards.open_index import open_index
from maedistill.data.shards.scan import USUAL, Members
from maedistill.errors import DataError, join_first
from maedistill.evaluation.accuracy import Score, evaluate
from maedistill.evaluation.context import EvalContext
from maedistill.evaluation.full_pass import Predictor
from maedistill.exporting.graph import GRAPH_FILES, LAYERS
from maedistill.weights.network import Network
from maedistill.weights.open_network import open_network

INT8_FILE = "model_int8.onnx"
_COMPARED = 16  # images for the error of a layer


@dataclass(frozen=True)
class Int8Spec:
    """How to quantise. calibration, val: shards for the ranges, and for the accuracy; members: of the samples of both.

    images: for the calibration. method: of the ranges: `percentile` (99.999) or `entropy`. max_drop: of top-1 against
    the fp32 graph, in points.
    """

    calibration: str
    val: str
    context: EvalContext
    images: int = 256
    method: Literal["percentile", "entropy"] = "percentile"
    max_drop: float = 0.5
    members: Members = USUAL


def quantise(folder: Path, spec: Int8Spec) -> dict[str, Any]:
    """Write model_int8.onnx beside model.onnx; return what was measured: layers with their error, top-1, the drop.

    Raises DataError if top-1 drops by more than `max_drop` points with all layers but a few in float, or if there are
    no images.
    """
    network = open_network(f"onnx:{folder / GRAPH_FILES['onnx']}", "predictor")
    inputs = _calibration_inputs(network, spec)
    apply_exif = network.exif == "apply"
    index = open_index(spec.val, split="val", members=spec.members, apply_exif=apply_exif)

    def accuracy(graph: Network) -> Score:
        images = EvaluationImages(index, torch.arange(len(index)), graph.transform())
        return evaluate(
            Predictor(graph.module, spec.context, mean=graph.mean, std=graph.std), images, spec.context
        ).score

    def written(layers: Sequence[str]) -> Network:
        write(layers)
        return open_network(f"onnx:{folder / INT8_FILE}", "predictor")

    before = accuracy(network)
    with _quantiser(folder, inputs, spec.method) as (layers, write):
        some = inputs[:_COMPARED]
        right = network.module(some)
        errors = {layer: float((written([layer]).module(some) - right).norm() / right.norm()) for layer in layers}
        order = sorted(layers, key=lambda layer: -errors[layer])  # the largest error first
        in_float = 0
        while True:
            after = accuracy(written(order[in_float:]))
            drop = 100 * (before.top1_correct - after.top1_correct) / before.images
            if drop <= spec.max_drop:
                break
            if (in_float := max(1, 2 * in_float)) >= len(order):
                raise DataError(
                    f"int8 loses {drop:.2f} points of top-1 on {before.images:,} images, more than {spec.max_drop:g}, "
                    f"even with {in_float // 2} of {len(order)} layers in float; worst: {join_first(order)}",
                    "allow more (--max-drop), calibrate with more images or by the other --calibration-method, or "
                    "leave out --int8",
                )
    return {
        "method": spec.method,
        "calibration_images": len(inputs),
        "layer_errors": {layer: errors[layer] for layer in order},
        "in_float": order[:in_float],
        "images": before.images,
        "top1_fp32": before.top1,
        "top1_int8": after.top1,
        "drop": drop,
    }


def _calibration_inputs(network: Network, spec: Int8Spec) -> Tensor:
    """Return what the graph takes of images spread over the calibration shards: [n, 3, s, s]."""
    apply_exif = network.exif == "apply"
    index = open_index(spec.calibration, split="train", members=spec.members, apply_exif=apply_exif)
    samples = torch.linspace(0, len(index) - 1, min(spec.images, len(index))).long()
    images = EvaluationImages(index, samples, network.transform())
    batches = exact_batches(images, batch=spec.context.batch, workers=spec.context.workers)
    pixels = torch.cat([part[ids >= 0].clone() for part, _, ids in batches])  # without those that do not decode
    if not len(pixels):
        raise DataError(
            f"none of the {len(samples)} images for calibration from {spec.calibration} can be decoded",
            "name shards with training images (--calibration)",
        )
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (network.mean, network.std))
    return normalize(to_float01(pixels), mean, std)


@contextmanager
def _quantiser(
    folder: Path, inputs: Tensor, method: str
) -> Iterator[tuple[list[str], Callable[[Sequence[str]], None]]]:
    """Calibrate once. Gives the layers of model.onnx, and a function that writes it with some of them in int8."""
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quant_utils, quantize_static

    model = onnx.load(folder / GRAPH_FILES["onnx"])
    layers = _give_inputs_of_their_own(model.graph)
    model = onnx.shape_inference.infer_shapes(model)
    quant_utils.add_pre_process_metadata(model)
    name = model.graph.input[0].name
    pixels = model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    with tempfile.TemporaryDirectory() as temporary:
        prepared = Path(temporary) / "prepared.onnx"
        onnx.save(model, prepared)
        run = partial(
            quantize_static,
            prepared,
            folder / INT8_FILE,
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=[*LAYERS],
            per_channel=True,
            reduce_range=True,  # 7 bits of weights: with 8, processors without VNNI saturate
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod[method.capitalize()],
            calibration_cache_path=Path(temporary) / "ranges.json",
            extra_options={
                "MatMulConstBOnly": True,
                "OpTypesToExcludeOutputQuantization": [*LAYERS],
                "CalibStridedMinMax": 1,  # one batch at a time, or all activations of all images are in memory
            },
        )

        def write(some: Sequence[str]) -> None:
            with redirect_stdout(io.StringIO()):
                run(calibration_data_reader=_reader(name, inputs, pixels=pixels), nodes_to_quantize=list(some))

        yield layers, write


def _give_inputs_of_their_own(graph: Any) -> list[str]:
    """Put an Identity before the input of each layer; return the layers' names.

    onnxruntime rounds a tensor for all that read it: without these, a residual addition or a layer in float would read
    the rounded input of its neighbour. When the graph runs, they are left out.
    """
    import onnx

    weights, nodes, layers = {tensor.name for tensor in graph.initializer}, [], []
    for node in graph.node:
        if node.op_type in LAYERS and node.input[1] in weights:
            own = f"{node.name}.input"
            nodes.append(onnx.helper.make_node("Identity", [node.input[0]], [own], name=own))
            node.input[0] = own
            layers.append(node.name)
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    return layers


def _reader(name: str, inputs: Tensor, *, pixels: bool) -> Any:
    """Return onnxruntime's reader of calibration data: the inputs in batches of 16, of which it takes a range."""
    from onnxruntime.quantization import CalibrationDataReader

    batches = [part.round().to(torch.uint8) if pixels else part for part in inputs.split(16)]

    class Reader(CalibrationDataReader):
        rest: list[Tensor] = batches

        def __len__(self) -> int:
            return len(batches)

        def set_range(self, start_index: int, end_index: int) -> None:
            self.rest = batches[start_index:end_index]

        def get_next(self) -> dict[str, np.ndarray] | None:
            first, self.rest = self.rest[:1], self.rest[1:]
            return {name: first[0].numpy()} if first else None

    return Reader()
