"""Open an encoder by its source: timm, a hub, a folder, a weights file, a run of this package, or random weights.

Both teachers and the initial weights of a fine-tuning run are opened here. Every key of a file is accounted for:
loaded, resampled, or left out.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
from huggingface_hub.errors import HfHubHTTPError
from timm.models.vision_transformer import VisionTransformer

from maedistill.errors import DataError, UserError
from maedistill.models.encoder import (
    MaskedEncoder,
    build_vit,
    require_known,
    require_plain_vit,
)
from maedistill.models.initialize import initialize
from maedistill.weights.from_run import open_saved
from maedistill.weights.state_dict import import_weights, load_encoder, require_finite
from maedistill.weights.timm_config import Triple, image_statistics, require_moderate_network
from maedistill.weights.weights_file import READ_ERRORS, read_weights_file, why_unreadable


@dataclass(frozen=True)
class Source:
    """An encoder with its weights, normalisation and license."""

    encoder: MaskedEncoder
    source: str
    mean: Triple
    std: Triple
    license: str
    audit: str
    origin: Mapping[str, Any] | None = None  # from run.json, for a `run:` source

    def describe(self) -> str:
        """Describe the source in one line for the log: source, size, keys, normalisation, license."""
        num_params_m = sum(p.numel() for p in self.encoder.parameters()) / 1e6
        size = f"{self.encoder.width} x {self.encoder.depth}, {num_params_m:.2f} M"
        return f"{self.source}  {size}  {self.audit}  mean {self.mean}  license {self.license}"


# What each kind of source returns: the network, the audit of its keys, and the metadata that its source states.
_Opened = tuple[VisionTransformer, object, Mapping[str, Any]]
_Size = Callable[[int], int]  # patch size -> image size


def open_source(
    source: str,
    *,
    section: str = "teacher",
    grid: int | None = None,
    image_size: int | None = None,
    model: str | None = None,
    pos_embed: str | None = None,
    mean: Triple | None = None,
    std: Triple | None = None,
    license: str | None = None,
    sha256: str | None = None,
    **dimensions: Any,
) -> Source:
    """Open the encoder `KIND:NAME`, with its positions resampled to a grid x grid of patches, or to `image_size`.

    KIND is timm, hf-hub, local-dir, file, run or random. model, positions and dimensions (see `build_vit`) describe the
    network of a weights file, or of random weights. section: the config section that names the source, for errors.
    Raises ConfigError if the network is not a plain ViT, DataError if the weights cannot be loaded or do not fit.
    """
    assert (grid is None) != (image_size is None)
    kind, _, name = source.partition(":")

    def size(patch_size: int) -> int:
        return image_size if image_size is not None else grid * patch_size

    if kind in ("timm", "hf-hub", "local-dir"):
        vit, audit, known = _open_timm(source, size, section)
    elif kind == "file":
        assert model is not None
        vit, audit, known = _open_file(name, model, size, section, pos_embed=pos_embed, sha256=sha256, **dimensions)
    elif kind == "run":
        vit, audit, known = _open_run(name, size)
    else:
        assert kind == "random"
        vit, audit, known = _open_random(name, size, pos_embed=pos_embed, **dimensions)
    stated_mean, stated_std = image_statistics(known, source)
    return Source(
        encoder=MaskedEncoder(vit),
        source=source,
        mean=tuple(mean or stated_mean),
        std=tuple(std or stated_std),
        license=license or str(known.get("license") or "") or f"not stated (set {section}.license)",
        audit=str(audit),
        origin=known.get("origin"),
    )


def _open_timm(source: str, size: _Size, section: str) -> _Opened:
    """Load a pretrained model with timm's loader, which resamples positions to the image size."""
    name = source.removeprefix("timm:")
    if source != name:
        require_known(name)
    try:
        require_moderate_network(name)
        with torch.device("meta"):
            shape = timm.create_model(name, pretrained=False, num_classes=0, global_pool="")
        require_plain_vit(shape, name)
        # Load with the head: without one, timm would accept a file that lacks keys.
        vit = timm.create_model(name, pretrained=True, img_size=size(shape.patch_embed.patch_size[0]))
        vit.reset_classifier(0, "")
    except UserError:
        raise
    except (HfHubHTTPError, *READ_ERRORS) as error:
        raise DataError(
            f"{name}: the weights cannot be had ({why_unreadable(error)})",
            f"check the name and the network, or download the file and use {section}.source=file:PATH with its model",
        ) from error
    require_finite(vit.state_dict(), name)
    return vit, f"{len(vit.state_dict())} keys loaded by timm", vit.pretrained_cfg


def _open_file(
    path: str,
    model: str,
    size: _Size,
    section: str,
    *,
    pos_embed: str | None,
    sha256: str | None,
    **dimensions: Any,
) -> _Opened:
    """Load a weights file in any of the known key styles. The file determines whether there is a class token."""
    imported = import_weights(read_weights_file(path, sha256=sha256, section=section), name=path)
    dimensions["class_token"] = "cls_token" in imported.part("encoder.vit.")
    vit = build_vit(
        model,
        image_size=size(dimensions.get("patch_size") or _patch_size(model)),
        pos_embed=pos_embed or "learned",
        **dimensions,
    )
    fixed = pos_embed is not None
    audit = load_encoder(vit, imported, name=path, section=section, optional=("norm.",), fixed_positions=fixed)
    return vit, audit, {}


def _open_run(folder: str, size: _Size) -> _Opened:
    """Load the network of a run folder from its newest intact checkpoint, without its classifier."""
    plain = open_saved(folder)
    facts = plain.facts
    image_size = size(plain.vit.patch_embed.patch_size[0])
    saved = plain if image_size == facts["input"]["size"] else open_saved(folder, image_size=image_size)
    saved.vit.reset_classifier(0, "")
    origin = {name: facts.get(name) for name in ("stage", "method", "data", "teacher", "license")}
    known = {
        "mean": facts["input"]["mean"],
        "std": facts["input"]["std"],
        "license": facts["license"],
        "origin": origin,
    }
    return saved.vit, f"{saved.audit} of {saved.checkpoint.name}", known


def _open_random(name: str, size: _Size, *, pos_embed: str | None, **dimensions: Any) -> _Opened:
    image_size = size(dimensions.get("patch_size") or _patch_size(name))
    vit = build_vit(name, image_size=image_size, pos_embed=pos_embed or "sincos2d", **dimensions)
    initialize(vit, seed=0)
    return vit, "random weights", {"license": "none, random weights"}


def _patch_size(model: str) -> int:
    with torch.device("meta"):
        return build_vit(model, image_size=224).patch_embed.patch_size[0]
