"""tools/evaluate.py as the tests start it, and the pictures and the classifier that they give it."""

from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from timm.models import save_for_hf

from maedistill.data.shards.sources import open_folder
from maedistill.data.shards.write import make_shards
from tests.support.launch import Finished, Launcher

ENCODER = {"img_size": 24, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
VIT = ENCODER | {"global_pool": "avg"}
CONFIG = {"input_size": (3, 24, 24), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.25), "crop_pct": 0.9}


def evaluate(launcher: Launcher, *arguments, ranks=1, code=0) -> Finished:
    """The tool as a person starts it, or with `ranks` processes."""
    return launcher.start(Path(), ["tools/evaluate.py", *arguments], ranks=ranks).finish(code)


def write_pictures(folder: Path) -> None:
    """Write pictures/ and shards/: 25 images of 12 classes, which neither ranks nor batches divide."""
    draws = np.random.default_rng(0)
    for i in range(25):
        path = folder / "pictures" / f"class{i % 12:02d}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(draws.integers(0, 256, (4, 5, 3), np.uint8))
        small.resize((40 + i, 30 + 2 * (i % 7)), Image.Resampling.BICUBIC).save(path)
    make_shards(open_folder(folder / "pictures"), folder / "shards", images_per_shard=10)


def save_encoders(folder: Path) -> None:
    """Write model/, a network without classifier and with random weights, and nan/, the same with a broken norm."""
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, **ENCODER)
    torch.nn.init.normal_(network.patch_embed.proj.weight, std=0.1)
    for name in ("model", "nan"):
        save_for_hf(network, folder / name, model_args=ENCODER, data_config=CONFIG, safe_serialization=True)
        torch.nn.init.constant_(network.norm.bias, torch.nan)


def classifier(*, num_classes: int = 12) -> torch.nn.Module:
    """A network of timm with random weights, whose predictions differ from image to image."""
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=num_classes, **VIT)
    torch.nn.init.normal_(vit.patch_embed.proj.weight)
    torch.nn.init.normal_(vit.head.weight, std=0.2)
    return vit
