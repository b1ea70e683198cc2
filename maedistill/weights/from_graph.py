"""Open an exported graph and the preprocess.json that describes its images, which is untrusted like the graph.

onnx:DIR/model.onnx, torch_export:DIR/model.pt2 -> Graph;   DIR/preprocess.json -> size, crop, normalisation, classes

    s image side   C outputs
"""

import os
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError

from maedistill.config.schema import Crop
from maedistill.errors import ConfigError, DataError
from maedistill.runs.manifest import CorruptCheckpoint, read_text
from maedistill.weights.from_file import why_unreadable
from maedistill.weights.from_onnx import open_onnx
from maedistill.weights.from_timm import CropMode, Interpolation, Mean, Side, Std, StrictModel, first_problem
from maedistill.weights.from_torch_export import open_torch_export
from maedistill.weights.graph import Graph
from maedistill.weights.license import NOT_STATED

PREPROCESSING = "preprocess.json"
OPENERS = {"onnx": open_onnx, "torch_export": open_torch_export}


class Preprocessing(StrictModel):
    """How images are prepared for a graph: crop, resize, scale to [0, 1], (x - mean) / std.

    input: `uint8` if the graph scales and normalises by itself. gives: whether its outputs are logits.
    """

    size: Side
    crop: Crop
    crop_mode: CropMode = "center"
    interpolation: Interpolation
    mean: Mean
    std: Std
    input: Literal["float32", "uint8"] = "float32"
    gives: Literal["logits", "features"] = "logits"
    exif: Literal["ignore", "apply"] = "ignore"
    classes: tuple[str, ...] = ()
    license: str = NOT_STATED


def open_graph(kind: str, name: str, *, image_size: int | None = None) -> tuple[Graph, dict[str, Any]]:
    """Return the graph in a file, and the entries of its `Network`: image size, normalisation, classes, license.

    Raises DataError for files that cannot be opened, ConfigError if the graph gives no logits or takes no images of
    this size.
    """
    path = Path(os.path.expanduser(name))
    if not os.path.isfile(path):  # Path.is_file raises errors of long names and of permissions
        raise DataError(f"{path}: no such file", f"name the file of a graph, e.g. {kind}:runs/NAME/export/model.onnx")
    stated = read_preprocessing(path.with_name(PREPROCESSING))
    if stated.gives != "logits":
        raise ConfigError(
            f"{kind}:{name} is an encoder, whose graph gives features", "export a fine-tuned run; or judge the run's "
            "features: maedistill evaluate knn, or probe",
        )  # fmt: skip
    graph = OPENERS[kind](path)
    size, own = image_size or stated.size, graph.takes.side
    if own not in (None, size):
        remedy = f"leave --image-size out, and set size in its {PREPROCESSING} to {own}"
        raise ConfigError(f"{kind}:{name} takes images of {own} pixels, not of {size}", remedy)
    if graph.takes.pixels != (stated.input == "uint8"):
        raise DataError(
            f"{path} takes {'uint8' if graph.takes.pixels else 'float32'}, but its {PREPROCESSING} says {stated.input}",
            "keep the files of one export together",
        )
    num_classes = outputs_of(graph, f"{kind}:{name}", size=size)
    entries = stated.model_dump(exclude={"size", "input", "gives"})
    if graph.takes.pixels:  # it has them inside: Predictor's normalisation gives the pixels back
        entries |= {"border": stated.mean, "mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}
    file_bytes = path.stat().st_size + graph.outside_bytes
    inside = "normalised in the graph, " if graph.takes.pixels else ""
    audit = f"{inside}{graph.precision}, {file_bytes / 1e6:.2f} MB"
    entries |= {"size": size, "num_classes": num_classes, "file_bytes": file_bytes, "precision": graph.precision}
    return graph, entries | {"own_size": stated.size, "audit": audit}


def outputs_of(graph: Graph, name: str, *, size: int) -> int:
    """Return C. Raises ConfigError unless the graph gives C outputs for each image, for one and for more."""
    shapes = []
    for count in (1, 2):
        try:
            shapes.append(tuple(graph(torch.zeros(count, 3, size, size)).shape))
        except (AssertionError, AttributeError, LookupError, RuntimeError, ValueError, TypeError) as error:
            raise ConfigError(
                f"{name} cannot run on {count} images of {size} pixels ({why_unreadable(error)})",
                f"check size in its {PREPROCESSING}, or export it for any number of images: maedistill export RUN",
            ) from error
    outputs = shapes[0][-1] if len(shapes[0]) == 2 else 0
    if not outputs or shapes != [(1, outputs), (2, outputs)]:
        raise ConfigError(
            f"{name} gives {shapes[1]} for two images, not a row each", "use a graph that classifies images"
        )
    return outputs


def read_preprocessing(path: Path) -> Preprocessing:
    """Read preprocess.json. Raises DataError if it is missing or invalid."""
    example = '{"size": 224, "crop": 0.9, "interpolation": "bicubic", "mean": [...], "std": [...]}'
    try:
        return Preprocessing.model_validate_json(read_text(path))
    except (CorruptCheckpoint, ValidationError) as error:
        problem = first_problem(error) if isinstance(error, ValidationError) else str(error)
        raise DataError(f"{path} does not describe the graph's images: {problem}", f"write it: {example}") from None
