"""Exports of 12 kinds of network, in all formats, on photographs: is the best class of each that of the network itself?

    python -m tests.exporting.photographs           the developers' 500 of ImageNet, half a minute
    python -m tests.exporting.photographs FOLDER    all .jpg, .jpeg and .png files in it: a folder of class folders

The kinds are those of test_graph.py, which looks at random images. Exit code 1 if a best class differs, or an output by
1e-5 of the largest one or more.
"""

import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import timm
import torch
from PIL import Image
from timm.models import save_for_hf

from maedistill.data.images.transforms import normalize, to_float01
from maedistill.data.loading.evaluation import evaluation_transform
from maedistill.exporting.graph import GRAPH_FILES, write_graphs
from maedistill.weights.from_onnx import open_onnx
from maedistill.weights.from_torch_export import open_torch_export
from tests.exporting.imitation import CROP, MEAN, STD
from tests.exporting.test_graph import KINDS, stated
from tests.support.launch import ROOT

BOUND, BATCH = 1e-5, 50


def read_images(folder: Path) -> torch.Tensor:
    """All photographs as the networks see them: [n, 3, 32, 32]."""
    transform = evaluation_transform(size=32, crop=CROP, interpolation="bicubic", crop_mode="center", mean=tuple(MEAN))
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not files:
        sys.exit(f"there are no photographs in {folder}")
    pixels = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return normalize(to_float01(pixels), mean, std)


@torch.no_grad()
def compare(kind: str, images: torch.Tensor, folder: Path) -> dict[str, tuple[int, float]]:
    """Of each format of a network: best classes that differ, and the largest difference as a share of the outputs'."""
    network = KINDS[kind]().eval()
    if kind == "CNN":  # all its features are positive, so one class would be the best for every image
        network.get_classifier().bias -= torch.cat([network(part) for part in images.split(BATCH)]).mean(0)
    write_graphs([*GRAPH_FILES], network, folder, stated(network))
    depth = {"depth": len(network.blocks)} if kind == "exit" else None  # timm's record is of the whole network
    save_for_hf(network, folder / "timm", model_args=depth, safe_serialization=True)
    formats = {
        "timm": timm.create_model(f"local-dir:{folder / 'timm'}", pretrained=True).eval(),
        "onnx": open_onnx(folder / GRAPH_FILES["onnx"]),
        "torch_export": open_torch_export(folder / GRAPH_FILES["torch_export"]),
    }
    found = {}
    expected = torch.cat([network(part) for part in images.split(BATCH)])  # [n, C]
    for name, model in formats.items():
        given = torch.cat([model(part) for part in images.split(BATCH)])
        differ = int((given.argmax(1) != expected.argmax(1)).sum())
        found[name] = differ, float((given - expected).abs().max() / expected.abs().max())
    assert len(expected.argmax(1).unique()) > 1, "a network of one answer would prove nothing"
    return found


def main() -> int:
    """Print a line for each kind and format."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT.parent / "shared/data/imagenet500"
    if not folder.is_dir():
        print(f"skipped: there are no photographs in {folder}")
        return 0
    images, worst, wrong = read_images(folder), 0.0, 0
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as temporary:
            for name, (differ, distance) in compare(kind, images, Path(temporary)).items():
                print(f"{kind:<32} {name:<12} {differ} best classes differ, outputs by {distance:.2g}", flush=True)
                worst, wrong = max(worst, distance), wrong + differ
    print(f"{len(images)} photographs, {len(KINDS)} kinds: {wrong} best classes differ, outputs by {worst:.2g} at most")
    return int(wrong > 0 or not worst < BOUND)


if __name__ == "__main__":
    sys.exit(main())
