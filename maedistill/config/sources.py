"""Sources of weights as users write them: KIND:NAME, or the bare path of a run, an export or a weights file.

runs/dmae_s -> run:runs/dmae_s      runs/dmae_s/export -> local-dir:runs/dmae_s/export      mae.pth -> file:mae.pth
model.onnx -> onnx:model.onnx       model.pt2 -> torch_export:model.pt2
"""

import os
import re

# Kinds of sources of weights, KIND:NAME. The first four state their architecture, and open any network.
NETWORK_KINDS = ("run", "timm", "hf-hub", "local-dir")
SOURCE_KINDS = (*NETWORK_KINDS, "file", "random")
GRAPH_KINDS = {
    "onnx": ".onnx",
    "torch_export": ".pt2",
}  # exported graphs, with their suffix: they run, but do not train
EMA = "ema"  # a teacher of pre-training without a source: the moving average of the student
PYTHON_KIND = "python"  # python:MODULE.CLASS stands for an object that a Python caller gives, see runs/objects.py
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")

_TIMM_NAME = re.compile(r"[a-z][a-z0-9_]*\d[a-z0-9_]*(\.\w+)?")  # resnet50, vit_small_patch16_224.mae


def named_source(source: str) -> str:
    """Return KIND:NAME of a bare path that exists; anything else unchanged."""
    kind, _, name = source.partition(":")
    if name and kind in (*SOURCE_KINDS, *GRAPH_KINDS):
        return source
    path = os.path.expanduser(source)
    if os.path.isfile(os.path.join(path, "run.json")):
        return f"run:{source}"
    if os.path.isfile(os.path.join(path, "config.json")):
        return f"local-dir:{source}"
    if not os.path.isfile(path):
        return source
    return next((f"{kind}:{source}" for kind, suffix in GRAPH_KINDS.items() if path.endswith(suffix)), f"file:{source}")


def why_unnamed(source: str, kinds: tuple[str, ...]) -> tuple[str, str] | None:
    """Return what is wrong with a source that is not of one of these kinds, and what to write; None if it is."""
    kind, _, name = source.partition(":")
    if name and kind in kinds:
        return None
    if os.path.isdir(os.path.expanduser(source)):
        cause = f"the folder {source!r} is neither a run (it has no run.json) nor an export (no config.json)"
        return cause, "name the folder that maedistill pretrain, finetune or export wrote, or a weights file"
    if source.endswith(WEIGHT_SUFFIXES) and kind not in SOURCE_KINDS:
        return f"there is no file {source!r}", "check the path of the weights"
    if _TIMM_NAME.fullmatch(source):
        return f"{source!r} is neither a path that exists nor of the form KIND:NAME", f"did you mean timm:{source}?"
    cause = f"{source!r} is not of the form KIND:NAME, and no run, export or weights file is there"
    if name and kind in (*SOURCE_KINDS, *GRAPH_KINDS):
        cause = f"{source!r} is of a kind that cannot be used here"
    return cause, f"use one of the kinds {', '.join(kinds)}, or a path that exists"
