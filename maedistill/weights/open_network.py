"""Open any network of any source, with its image preprocessing: the one door to weights.

open_network("runs/ft_s")                              -> Network, from RUN/run.json and its newest checkpoint
open_network("timm:resnet18.a1_in1k", "classifier")    -> Network, with size, crop and normalisation from timm
open_network("timm:vit_large_patch16_224.mae", "encoder", grid=14).encoder             -> MaskedEncoder
open_network("file:mae.pth", "encoder", grid=14, spec=EncoderSpec("vit_large_patch16_224")).encoder
open_network("onnx:export/model.onnx", "predictor")    -> Network, with size, crop and normalisation beside the file

from_timm, from_transformers, from_run, from_file and from_graph hold the openers; backbone makes features of it.
"""

import math
import os
import pickle
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import timm
from timm.layers import PatchEmbed

from maedistill.config.sources import GRAPH_KINDS, NETWORK_KINDS, SOURCE_KINDS, named_source, why_unnamed
from maedistill.errors import ConfigError
from maedistill.models.encoder import can_mask
from maedistill.models.initialize import initialize
from maedistill.models.meta import meta_device
from maedistill.models.vits import (
    PlainViT,
    TimmModel,
    require_colour,
    require_known,
    require_plain_vit,
    require_square_patches,
)
from maedistill.weights.from_file import EncoderSpec, Inspect, open_file, why_unreadable
from maedistill.weights.from_graph import open_graph
from maedistill.weights.from_run import Weights, build_run, open_run
from maedistill.weights.from_timm import image_config, open_timm, stated_exif
from maedistill.weights.from_transformers import open_transformers, transformers_folder
from maedistill.weights.license import NO_OTHERS, NOT_STATED
from maedistill.weights.network import Network
from maedistill.weights.run_metadata import Origin
from maedistill.weights.state_dict import require_finite

# What a network is for. `outputs`: it runs, and if it has classes, it gives a logit for each. `classifier`: it also has
# classes. `predictor`: a classifier, or an exported graph of one. `encoder`: a plain ViT, its classifier removed, all
# weights finite. `teacher`: an encoder, or a network that sees whole images, all weights finite. `any`: nothing is
# checked.
Use = Literal["any", "outputs", "classifier", "predictor", "encoder", "teacher"]
_SIZE = 224  # of the images of a module that states none


def open_network(
    source: str,
    use: Use = "any",
    *,
    weights: str = "model",
    exit: int | None = None,
    peer: int = 0,
    image_size: int | None = None,
    grid: int | None = None,
    spec: EncoderSpec | None = None,
    section: str | None = None,
    size_key: str = "--image-size",
) -> Network:
    """Open `run:PATH`, `local-dir:PATH`, `timm:NAME`, `hf-hub:ID`, `file:PATH`, or the bare path of any of these.

    spec: what a file does not state; with one, also `random:NAME`. weights: `ema` for the moving average of a run or of
    a checkpoint file, or the name of one of a file's networks, see `choose_entry`. exit: the block of one of a run's
    exits, where the network ends. peer: of mutual learning, 0 for the run's own student. Positions are resampled to
    `image_size` or to a `grid` x `grid` of patches; with both, to a multiple of the grid. By default the size is the
    network's own. section, size_key: the config section of the source and the option of its image size, for errors.
    Raises ConfigError for an unknown kind of source or a network that does not fit its use, before its weights are
    loaded where possible; DataError for weights that cannot be loaded or do not fit.
    """
    kinds = (*NETWORK_KINDS, "file") if spec is None else SOURCE_KINDS
    kind, name = _kind_and_name(source, kinds=(*kinds, *GRAPH_KINDS) if use == "predictor" else kinds)
    source = f"{kind}:{name}"
    if weights != "model" and (kind not in ("run", "file") or (kind == "run" and weights != "ema")):
        remedy = "leave the choice out, or choose ema" if kind == "run" else "leave the choice out"
        raise ConfigError(f"{source} has no weights called {weights!r}", f"{remedy} (--weights, --ema)")
    if exit is not None and kind != "run":
        raise ConfigError(f"{source} has no exits", "leave out --exit: only runs have them; export each separately")
    if peer and kind != "run":
        raise ConfigError(f"{source} has no peers", "leave out --peer: only runs have them; export each separately")
    if kind in GRAPH_KINDS:
        graph, entries = open_graph(kind, name, image_size=image_size)
        return Network(graph, source, **entries)
    own_sizes: list[int] = []

    def check(network: TimmModel) -> int | None:
        own_sizes.append(next(iter(getattr(getattr(network, "patch_embed", None), "img_size", None) or (0,))))
        return _check(source, use, network, image_size=image_size, grid=grid, size_key=size_key)

    if kind == "run":
        network = _open_run(name, use, check, weights="ema" if weights == "ema" else "model", exit=exit, peer=peer)
    elif kind == "file":
        spec = spec or EncoderSpec()
        vit, audit = open_file(name, spec, check, section=section, weights=weights, classifies=use != "encoder")
        tagged = "." in (spec.model or "")  # vit_base_patch16_224.mae: timm knows these very weights
        network = _with_weights(vit, source, audit, stated=_stated(vit, source) if tagged else {})
    elif (folder := transformers_folder(source)) is not None:
        vit, audit, stated = open_transformers(folder, source, check, classifies=use != "encoder")
        network = _with_weights(vit, source, audit, stated=stated)
    elif spec is not None and kind == "random":
        network = _open_random(name, use, check, spec=spec, section=section)
    else:
        network = _open_timm(source, use, check)
    network = replace(network, own_size=own_sizes[0] or network.size)
    if use in ("outputs", "classifier", "predictor"):
        shape = tuple(network.output(size_key=size_key).shape)
        if network.num_classes and shape != (1, network.num_classes):
            raise ConfigError(
                f"{network.name} gives {shape} for one image, not {network.num_classes} logits",
                "use a model that classifies images",
            )
    return network


def given_network(module: TimmModel, name: str, *, image_size: int | None, trained: bool = False) -> Network:
    """Describe a module that a Python caller gives, by a copy: the caller's own is not moved, cast or frozen.

    image_size: of its images, unless it is made for one size. trained: the run trains the module, which is not copied.
    Preprocessing and license are those that a timm model states (`pretrained_cfg`), else ImageNet's and unknown.
    Raises ConfigError for a module that cannot be copied.
    """
    try:
        module = (module if trained else deepcopy(module)).eval()
    except (AttributeError, RuntimeError, TypeError, ValueError, pickle.PicklingError) as error:
        remedy = "leave out what copy.deepcopy refuses, such as a tensor with a graph that a forward pass left in it"
        raise ConfigError(f"{name} cannot be copied ({why_unreadable(error)})", remedy) from error
    stated = getattr(module, "pretrained_cfg", None)
    entries = image_config(module, name) if stated else None
    preprocessing = entries.model_dump(include={"mean", "std"}) if entries else {"normalization_known": False}
    own = getattr(getattr(module, "patch_embed", None), "img_size", None)
    if hasattr(module, "grid") and hasattr(module, "patch_size"):
        own = [module.grid * module.patch_size]
    license_name, num_classes = getattr(stated, "license", None) or NOT_STATED, int(getattr(module, "num_classes", 0))
    size = own[0] if own else image_size or (entries.input_size[1] if entries else _SIZE)
    return Network(
        module, name, size, license_name, num_classes=num_classes, own_size=size, audit="from Python", **preprocessing
    )


def _kind_and_name(source: str, *, kinds: tuple[str, ...]) -> tuple[str, str]:
    """Split `source` into kind and name: ("timm", "resnet18"), ("run", "runs/a")."""
    source = named_source(source)
    if problem := why_unnamed(source, kinds):
        raise ConfigError(*problem)
    kind, _, name = source.partition(":")
    return kind, os.path.expanduser(name) if kind == "local-dir" else name


def _check(
    source: str, use: Use, network: TimmModel, *, image_size: int | None, grid: int | None, size_key: str
) -> int | None:
    """Check a network that holds no weights yet, and return the image size to open it at; None for its own.

    Raises ConfigError unless it suits its use and its patches cover the whole image: timm would ignore the last rows
    and columns.
    """
    if use == "encoder":
        require_plain_vit(network, source)
    if use in ("classifier", "predictor") and not network.num_classes:
        raise ConfigError(
            f"{source} has no classifier, it opens only as an encoder",
            f"fine-tune it and evaluate that run: maedistill finetune CONFIG init.source={source}; "
            "or judge its features: maedistill evaluate probe, or knn",
        )
    require_colour(network, source)
    patches: Any = getattr(network, "patch_embed", None)
    if grid is not None and (use != "teacher" or can_mask(network)):
        patch = require_square_patches(network, source).patch_embed.patch_size[0]
        if image_size is not None and image_size % (grid * patch):
            near = max(1, round(image_size / (grid * patch))) * grid * patch
            raise ConfigError(
                f"{size_key}: patches of {patch} pixels in images of {image_size} do not give {grid} x {grid} patches",
                f"use {near}, a multiple of {grid} x {patch}, or leave it out for {grid * patch}",
            )
        return image_size or grid * patch
    cuts_off = isinstance(patches, PatchEmbed) and not patches.dynamic_img_pad
    patch_size = math.lcm(*patches.patch_size) if cuts_off else 1
    if image_size is not None and image_size % patch_size:
        raise ConfigError(
            f"{source} has patches of {patch_size} pixels, which do not divide images of {image_size}",
            f"use a multiple, e.g. {size_key}={max(1, round(image_size / patch_size)) * patch_size}",
        )
    return image_size


def _open_random(name: str, use: Use, check: Inspect, *, spec: EncoderSpec, section: str | None) -> Network:
    """Build a timm model with random weights, the same every time; a plain ViT of the dimensions that `spec` gives."""
    source, license_name, audit = f"random:{name}", NO_OTHERS, "random weights"
    require_known(name)
    with meta_device():
        sees_all = use == "teacher" and not can_mask(timm.create_model(name, pretrained=False))
    if not sees_all:
        vit = replace(spec, model=name).build(spec.pos_embed or "sincos2d", check)
        initialize(vit, seed=0)
        return Network(vit, source, vit.patch_embed.img_size[0], license_name, audit=audit)
    for key, value in asdict(spec).items():
        if value is not None:
            raise ConfigError(f"{section}.{key}: {source} is not a plain ViT and has its own {key}", "remove it")
    network = _open_timm(f"timm:{name}", use, check, pretrained=False)
    return replace(network, name=source, license=license_name, audit=audit)


def _open_timm(source: str, use: Use, check: Inspect, *, pretrained: bool = True) -> Network:
    """Open any model that timm can open, with the preprocessing that timm states."""
    module, size = open_timm(source, check, pretrained=pretrained)
    if use in ("encoder", "teacher") and pretrained:
        if can_mask(module):
            module.reset_classifier(0, "")
        require_finite(module.state_dict(), source)
    config, test = image_config(module, source), image_config(module, source, test=True)
    differs = (test.input_size, test.crop_pct) != (config.input_size, config.crop_pct)
    return Network(
        module,
        source,
        size or config.input_size[1],
        num_classes=module.num_classes,
        test_size=test.input_size[1] if differs else None,
        test_crop=test.crop_pct if differs else None,
        **_stated(module, source),
        exif=stated_exif(source),
        classes=tuple(map(str, module.pretrained_cfg.get("label_names") or ())),
        audit=f"{len(module.state_dict())} keys loaded by timm",
    )


def _stated(module: TimmModel, source: str) -> dict[str, Any]:
    """Return the license and the preprocessing that timm states for a model, but for the image size."""
    config = image_config(module, source)
    entries = config.model_dump(include={"mean", "std", "interpolation", "crop_mode"}) | {"crop": config.crop_pct}
    return entries | {"license": str(module.pretrained_cfg.get("license") or NOT_STATED)}


def _with_weights(vit: PlainViT, source: str, audit: str, *, stated: dict[str, Any]) -> Network:
    """Describe a ViT that timm did not load. stated: its license, preprocessing and classes, as far as known."""
    entries: dict[str, Any] = {"license": NOT_STATED, "normalization_known": "mean" in stated} | stated
    return Network(vit, source, vit.patch_embed.img_size[0], num_classes=vit.num_classes, audit=audit, **entries)


def _open_run(path: str, use: Use, check: Inspect, *, weights: Weights, exit: int | None, peer: int) -> Network:
    """Open the network of a run folder, pre-trained or fine-tuned."""
    run = open_run(path, weights=weights, exit=exit, peer=peer, inspect_network=check)
    if use in ("encoder", "teacher"):
        run.vit.reset_classifier(0, "")
    name = f"run:{path} {run.checkpoint.name}{' (ema)' if weights == 'ema' else ''}{_part(exit, peer)}"
    return _of_run(run.vit, run.metadata, name, str(run.audit))


def unloaded_run(path: str | Path) -> Network:
    """Build the network of a run folder, without its weights. Raises DataError unless it is a run of this package."""
    vit, metadata = build_run(path)
    return _of_run(vit.eval(), metadata, f"run:{path}", "weights of its own")


def _of_run(vit: PlainViT, metadata: Mapping[str, Any], name: str, audit: str) -> Network:
    entry = metadata["input"]
    return Network(
        vit,
        name,
        vit.patch_embed.img_size[0],
        metadata["license"],
        num_classes=vit.num_classes,
        mean=tuple(entry["mean"]),
        std=tuple(entry["std"]),
        crop=entry["crop"],
        exif=entry.get("exif", "ignore"),
        classes=tuple(metadata.get("classes") or ()),
        audit=audit,
        origin={name: metadata.get(name) for name in Origin.model_fields},
    )


def _part(exit: int | None, peer: int) -> str:
    return (f" (peer {peer})" if peer else "") + (f" (exit after block {exit})" if exit is not None else "")
