"""Imitated runs: a run folder as the tools leave it, with the random weights of a network that the test still has."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer

from maedistill.models.vits import build_vit
from maedistill.runs.checkpoint import take_snapshot, write_snapshot
from maedistill.training.engine import MOMENTS, TrainingState
from maedistill.weights.from_run import describe_network

TINY = {"width": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
MEAN, STD, CROP = [0.5, 0.4, 0.3], [0.25, 0.2, 0.1], 0.9
SETTINGS = {
    "pretrain": """\
method: dmae
student: {model: vit_tiny_patch16_224}
teacher: {source: "timm:vit_large_patch16_224.mae"}
masks: {student_keep_ratio: 0.25}
align: {student: [1], teacher: [17]}
optim: {epochs: 100, global_batch: 512, base_lr: 1.0e-4, warmup_epochs: 20}
log: {knn_images: 777}
""",
    "finetune": """\
init: {source: "run:runs/dmae"}
data: {val: val.tar}
augment: {mixup: 0.2, cutmix: 0.0}
optim: {epochs: 30, layer_decay: 0.85}
""",
}
LISTED = "timm:vit_large_patch16_224.mae, 1024 x 24, 303.3 M, 294 keys loaded by timm, license cc-by-nc-4.0"
TEACHER = "timm:vit_large_patch16_224.mae  1024 x 24, 303.3 M  294 keys loaded by timm  license cc-by-nc-4.0"
START = {
    "command": "python tools/pretrain.py tiny.yaml run=runs/dmae",
    "host": "secret-host",
    "versions": {"python": "3.11.7", "torch": "2.99.1"},
}
METADATA = {
    "pretrain": {"method": "dmae", "teacher": TEACHER},
    "finetune": {
        "init": "run:runs/dmae  32 x 2, 0.1 M",
        "classes": ["ant", "bee", "cat"],
        "validation": {"images": 1000, "fingerprint": "fedcba9876543210"},
        "origin": {
            "stage": "pretrain", "method": "dmae", "teacher": TEACHER, "license": "cc-by-nc-4.0",
            "data": {"images": 54321, "fingerprint": "aaaabbbbccccdddd"},
        },
    },
}  # fmt: skip


def scored(step: int, epoch: float, *, top1: int, top5: int, loss: float, prefix: str = "") -> dict[str, Any]:
    """The record of an evaluation on 1000 images. top1, top5: how many are right."""
    score = {"top1": top1 / 1000, "top1_correct": top1, "top5": top5 / 1000, "top5_correct": top5}
    score |= {"images": 1000, "val_loss": loss}
    return {"step": step, "epoch": epoch, **{prefix + name: value for name, value in score.items()}}


RECORDS = {
    "pretrain": [
        {"step": 6, "loss": 0.75, "pixels": 0.5, "align/1": 0.25, "epoch": 12.5},
        {"step": 6, "knn": 0.3141, "epoch": 12.5},
        {"step": 8, "loss": 0.1111, "pixels": 0.1111, "epoch": 99.0},  # of weights that no checkpoint holds
    ],
    "finetune": [
        scored(4, 1.0, top1=1, top5=2, loss=9.0),
        scored(7, 2.5, top1=812, top5=990, loss=0.6789),
        scored(7, 2.5, top1=823, top5=995, loss=0.5678, prefix="ema_"),
        scored(9, 3.0, top1=999, top5=999, loss=0.1),
    ],
}


def random_vit(model: str = "vit_tiny_patch16_224", *, size: int = 32, **shape: Any) -> VisionTransformer:
    """A network of which every tensor matters: norms, tokens and positions are random as well."""
    vit = build_vit(model, image_size=size, **TINY | shape).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in vit.state_dict().items():
            value.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.3, generator=generator)
    return vit


def imitate(folder: Path, vit: VisionTransformer, stage: str = "pretrain", **changed: Any) -> Path:
    """A run folder of `stage` that holds `vit`, and as its moving average the same weights times -1."""
    prefix = {"pretrain": "encoder.vit.", "finetune": "vit."}[stage]
    weights = {prefix + name: value.clone() for name, value in vit.state_dict().items()}
    averaged = SimpleNamespace(state_dict=lambda: {name: -value for name, value in weights.items()})
    if stage == "pretrain":  # what is left behind
        weights |= {name: torch.ones(3) for name in ("decoder.norm.weight", "projections.0.bias", "mean")}
    engine = SimpleNamespace(state=lambda: TrainingState(weights, {kind: {} for kind in MOMENTS}, {}))
    snapshot = take_snapshot(step=7, engine=engine, state={}, extra_networks={"ema": averaged})
    write_snapshot(folder / "checkpoints", snapshot, keep=1)
    metadata = {
        "stage": stage,
        "network": describe_network(vit),
        "input": {"size": vit.patch_embed.img_size[0], "mean": MEAN, "std": STD, "crop": CROP},
        "data": {"images": 12345, "fingerprint": "0123456789abcdef"},
        "license": "cc-by-nc-4.0",
        "starts": [START, START],
    }
    (folder / "run.json").write_text(json.dumps(metadata | METADATA[stage] | changed))
    (folder / "config.yaml").write_text(f"run: {folder}\n{SETTINGS[stage]}".replace("data: {", "data: {train: a.tar, "))
    if stage == "pretrain":
        with (folder / "config.yaml").open("a") as file:
            file.write("data: {train: a.tar}\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS[stage]))
    return folder
