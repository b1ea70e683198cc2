"""Made-up records of runs for pages: a run folder as the tools leave it, without training one."""

import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter

from maedistill.config.loader import load_config
from maedistill.config.render import config_yaml
from maedistill.config.values import STAGES
from maedistill.report.sheet import tile

STEPS_PER_EPOCH = 1251  # of ImageNet with a global batch of 1,024


def made_run(
    folder: Path,
    stage: str = "pretrain",
    *,
    epochs: float = 2,
    done: float | None = None,
    every: int = 500,
    settings: tuple[str, ...] = (),
    ended: str | None = "finished",
    **metadata,
) -> Path:
    """Write the records of a run, `done` of its epochs, a line every so many steps, an evaluation every epoch."""
    folder.mkdir(parents=True)
    (folder / "pictures").mkdir()
    size = ["optim.warmup_epochs=0.5", "optim.global_batch=1024", "data.train=train.tar", f"run={folder}"]
    recipe = "imagenet/dmae_vit_s" if stage == "pretrain" else "finetune/vit_small"
    more = ["data.val=val.tar", "init.source=run:runs/a", "optim.epochs=100"] if stage == "finetune" else []
    config = load_config(recipe, [*size, *more, f"optim.epochs={epochs}", *settings], root=STAGES[stage]).config
    (folder / "config.yaml").write_text(config_yaml(config))
    entry = {
        "stage": stage,
        "network": {"name": "vit_small_patch16_224", "arguments": {"embed_dim": 384, "depth": 8}},
        "data": {"images": 1024 * STEPS_PER_EPOCH, "fingerprint": "0123456789abcdef" * 4},
        "teacher": "timm:vit_large_patch16_224.mae, 1024 x 24, 303.3 M",
        "license": "cc-by-nc-4.0",
        "starts": [{"command": f"maedistill {stage} {recipe} run={folder}", "step": 0, "versions": {"torch": "2.11"}}],
    }
    if stage == "finetune":
        entry |= {"validation": {"images": 50_000, "fingerprint": "f" * 64}, "init": "run:runs/a", "classes": None}
    (folder / "run.json").write_text(json.dumps(entry | metadata))
    draws, records = np.random.default_rng(0), []
    for step in range(every, int((done or epochs) * STEPS_PER_EPOCH) + 1, every):
        epoch, noise = step / STEPS_PER_EPOCH, draws.normal(0, 0.01)
        loss = 0.4 + 1.2 * math.exp(-epoch / 8) + noise
        parts = {"pixels": 0.7 * loss, "align/17": 0.3 * loss} if stage == "pretrain" else {"cross_entropy": 4 * loss}
        speed = {"images_per_second": 900 + 40 * draws.normal(), "trained_seconds": 1.1 * step, "eta_seconds": 60.0}
        lr = {"lr": 1.5e-4 * 0.5 * (1 + math.cos(math.pi * epoch / (epochs + 1))), "grad_norm": 1 + abs(draws.normal())}
        records.append({"step": step, "epoch": epoch, "loss": loss, **parts, **lr, **speed})
        if step // STEPS_PER_EPOCH > (step - every) // STEPS_PER_EPOCH:
            share = round(0.8 * (1 - math.exp(-epoch / 15)), 4)
            score = {"knn": share, "images": 10_000, "bad_images": 0}
            if stage == "finetune":
                counts = {"top1_correct": round(share * 50_000), "top5_correct": round(min(1, 1.2 * share) * 50_000)}
                score = {"top1": share, "top5": min(1, 1.2 * share), **counts, "images": 50_000, "val_loss": 4 * loss}
            records.append({"step": step, "epoch": epoch, **score})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if ended is not None:
        (folder / "exit.json").write_text(json.dumps({"exit_code": 0, "reason": ended, "step": step}))
    return folder


def draw_sheets(folder: Path, epochs: list[int], *, side: int = 224, amd: bool = True) -> None:
    """Write a reconstruction sheet for each epoch: smooth noise that gets sharper."""
    draws = np.random.default_rng(1)
    coarse = [Image.fromarray(draws.integers(0, 256, (9, 9, 3), dtype=np.uint8)) for _ in range(8)]
    clear = [image.resize((side, side), Image.Resampling.BICUBIC) for image in coarse]
    grain = [Image.fromarray(draws.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(8)]
    true = [Image.blend(image, noise, 0.12) for image, noise in zip(clear, grain, strict=True)]

    def column(images: list[Image.Image]) -> torch.Tensor:
        return torch.stack([torch.tensor(np.asarray(image)).permute(2, 0, 1) / 255 for image in images])

    seen = column(true)
    mask = torch.rand(8, 1, side // 16, side // 16, generator=torch.Generator().manual_seed(0))
    mask = mask.repeat_interleave(16, 2).repeat_interleave(16, 3)
    for epoch in epochs:
        blurred = [image.filter(ImageFilter.GaussianBlur(side / 12 / (1 + epoch / 10))) for image in true]
        predicted = column(blurred)
        masks = {
            "student sees": torch.where(mask < 0.25, seen, 0.5),
            "teacher sees": torch.where(mask < 0.5, seen, 0.5),
        }
        masks = masks if amd else {"seen": masks["student sees"]}
        results = {"predicted": predicted, "true": seen, "|error| x 2": 2 * (predicted - seen).abs()}
        sheet = tile([masks, results], title=f"epoch {epoch}")
        sheet.save(folder / "pictures" / f"step_{epoch * STEPS_PER_EPOCH:09d}.png")
