"""The frozen teacher: found by its source, run to its last tap on its visible patches, never trained, never saved.

B batch   T patches visible to the teacher   Q its prefix tokens   D_t its width   s image side
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from huggingface_hub.errors import HfHubHTTPError
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as vision
from torchvision.transforms.v2.functional import InterpolationMode

from maedistill.config.loader import load_config
from maedistill.data.transforms import normalize
from maedistill.errors import ConfigError, DataError, UserError
from maedistill.masking import PatchSplit
from maedistill.models.encoder import MaskedEncoder, build_vit, require_known, require_plain_vit
from maedistill.models.initialize import initialize
from maedistill.models.weights import (
    READ_ERRORS,
    Audit,
    Imported,
    import_weights,
    load_encoder,
    read_weights_file,
    why_unreadable,
)
from maedistill.training.checkpoint import newest_intact, read_weights
from maedistill.training.run_folder import RunFolder

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class TeacherSource:
    """A teacher's encoder and what is known about it."""

    encoder: MaskedEncoder
    source: str
    mean: Triple
    std: Triple
    licence: str
    audit: str

    def describe(self) -> str:
        """One line for the log: source, size, keys, normalisation, licence."""
        millions = sum(p.numel() for p in self.encoder.parameters()) / 1e6
        size = f"{self.encoder.width} x {self.encoder.depth}, {millions:.1f} M"
        return f"{self.source}  {size}  {self.audit}  mean {self.mean}  licence {self.licence}"


class Teacher(nn.Module):
    """Features of the teacher's tapped blocks. Reads images in [0, 1] and does its own scaling and normalisation."""

    mean: Tensor
    std: Tensor

    def __init__(self, source: TeacherSource, *, taps: Sequence[int], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        depth = source.encoder.depth
        if max(taps) >= depth:
            raise ConfigError(
                f"align.teacher: block {max(taps)} does not exist, the teacher has {depth}", f"use 0 to {depth - 1}"
            )
        self.encoder = source.encoder.to(dtype)
        self.taps, self.dtype = tuple(taps), dtype
        self.num_prefix, self.width = source.encoder.num_prefix, source.encoder.width
        self.image_size = source.encoder.grid * source.encoder.patch_size
        self.register_buffer("mean", torch.tensor(source.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(source.std).view(3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: Tensor, split: PatchSplit) -> dict[int, Tensor]:
        """images in [0, 1], [B, 3, s, s] -> {block: [B, Q + T, D_t]}, rows in the order of `split.teacher`.

        Where the teacher's patches have another size than the student's, the image is resized so that both see the
        same grid: patch i covers the same part of the picture for both.
        """
        if images.shape[-1] != self.image_size:
            size = [self.image_size, self.image_size]
            images = vision.resize(images, size, interpolation=InterpolationMode.BICUBIC, antialias=True)
        images = normalize(images, self.mean, self.std).to(self.dtype)
        return self.encoder(images, split.teacher, taps=self.taps, to_last_tap=True)[1]


def open_teacher(
    source: str,
    *,
    grid: int,
    model: str | None = None,
    width: int | None = None,
    depth: int | None = None,
    heads: int | None = None,
    patch_size: int | None = None,
    positions: str | None = None,
    mean: Triple | None = None,
    std: Triple | None = None,
    licence: str | None = None,
    sha256: str | None = None,
) -> TeacherSource:
    """The teacher named by `KIND:NAME`, its positions resampled to a grid x grid of patches.

    KIND is timm, hf-hub, local-dir, file, run or random; the keywords are those of the config's `teacher` section.
    Raises ConfigError for a source that cannot be walked, DataError for weights that cannot be had or do not fit.
    """
    kind, _, name = source.partition(":")
    dimensions = {"width": width, "depth": depth, "heads": heads, "patch_size": patch_size}
    if kind in ("timm", "hf-hub", "local-dir"):
        if kind == "timm":
            require_known(name)
        vit, audit = _open_timm(name if kind == "timm" else source, grid=grid)
        known = vit.pretrained_cfg
    elif kind == "file":
        assert model is not None
        vit, audit = _open_file(name, model, grid=grid, positions=positions, sha256=sha256, **dimensions)
        known = {"license": "not stated (set teacher.licence)"}
    elif kind == "run":
        vit, audit, known = _open_run(name, grid=grid)
    else:
        assert kind == "random"
        image_size = grid * (patch_size or _patch_size(name))
        vit = build_vit(name, image_size=image_size, positions=positions or "sincos2d", **dimensions)
        initialize(vit, seed=0)
        audit, known = "random weights", {"license": "none, random weights"}
    return TeacherSource(
        encoder=MaskedEncoder(vit),
        source=source,
        mean=tuple(mean or known.get("mean") or IMAGENET_DEFAULT_MEAN),
        std=tuple(std or known.get("std") or IMAGENET_DEFAULT_STD),
        licence=licence or known.get("license") or "not stated (set teacher.licence)",
        audit=str(audit),
    )


def _patch_size(model: str) -> int:
    with torch.device("meta"):
        return build_vit(model, image_size=224).patch_embed.patch_size[0]


def _open_timm(name: str, *, grid: int) -> tuple[nn.Module, str]:
    """A pretrained model by timm's own loader, which resamples positions to the image size asked for."""
    try:
        with torch.device("meta"):
            shape = timm.create_model(name, pretrained=False, num_classes=0, global_pool="")
        require_plain_vit(shape, name)
        size = grid * shape.patch_embed.patch_size[0]
        vit = timm.create_model(name, pretrained=True, img_size=size)  # with its head: without, keys may be missing
        vit.reset_classifier(0, "")
    except UserError:
        raise
    except (HfHubHTTPError, *READ_ERRORS) as error:
        raise DataError(
            f"{name}: the weights cannot be had ({why_unreadable(error)})",
            "check the name and the network, or download the file and use teacher.source=file:PATH teacher.model=NAME",
        ) from error
    return vit, f"{len(vit.state_dict())} keys loaded by timm"


def _open_file(
    path: str, model: str, *, grid: int, positions: str | None, sha256: str | None, **dimensions: int | None
) -> tuple[nn.Module, Audit]:
    """A weights file in any of the known key styles. Whether there is a class token, the file says."""
    imported = import_weights(read_weights_file(path, sha256=sha256), name=path)
    vit = build_vit(
        model,
        image_size=grid * (dimensions["patch_size"] or _patch_size(model)),
        positions=positions or "learned",
        class_token="cls_token" in imported.part("encoder.vit."),
        **dimensions,
    )
    audit = load_encoder(vit, imported, name=path, optional=("norm.",), fixed_positions=positions is not None)
    return vit, audit


def _open_run(folder: str, *, grid: int) -> tuple[nn.Module, str, dict[str, Any]]:
    """The student of one of our own run folders, from its newest complete checkpoint."""
    run = RunFolder(folder)
    checkpoint = newest_intact(run.checkpoints)
    if checkpoint is None:
        raise DataError(f"{run.path} holds no checkpoint", "name a run folder of tools/pretrain.py that has saved one")
    config = load_config(run.config).config
    size = grid * (config.student.patch_size or _patch_size(config.student.model))
    vit = build_vit(image_size=size, **config.student.model_dump())
    audit = load_encoder(vit, Imported(read_weights(checkpoint)), name=str(checkpoint))
    audit = f"{audit} of {checkpoint.name} ({config.optim.epochs:g} epochs planned)"
    return vit, audit, {"mean": config.data.mean, "std": config.data.std, "license": run.facts().get("licence")}
