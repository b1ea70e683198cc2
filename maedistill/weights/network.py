"""Open any network together with its image preprocessing: a run of this package, an export, or any timm model.

open_network("runs/ft_s")                        -> Network, from RUN/run.json and its newest checkpoint
open_network("timm:resnet18.a1_in1k")            -> Network, with size, crop and normalisation from timm

classifier.py checks that a network returns logits; backbone.py checks that it returns features.
"""

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from timm.data import resolve_model_data_config
from timm.layers import PatchEmbed
from torch import Tensor, nn

from maedistill.data.loading.evaluation import evaluation_transform
from maedistill.errors import ConfigError, DataError
from maedistill.weights.from_run import Weights, open_saved
from maedistill.weights.run_json import read_facts
from maedistill.weights.timm_config import image_config, require_moderate_network
from maedistill.weights.weights_file import READ_ERRORS, why_unreadable

KINDS = ("run", "local-dir", "timm", "hf-hub")


@dataclass(frozen=True, eq=False)
class Network:
    """A timm module for normalised images [B, 3, size, size], with or without a classifier, and its preprocessing."""

    module: nn.Module
    name: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    size: int
    crop: float  # fraction of the shorter side that is kept
    interpolation: str
    crop_mode: str
    num_classes: int  # 0 for an encoder without a classifier
    license: str
    classes: tuple[str, ...] = ()  # names, position = label; empty if not known

    @property
    def parameters(self) -> int:
        """Return the number of parameters."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    def describe(self) -> str:
        """Describe the network in one line for the log: source, size, classes, license."""
        num_params_m = self.parameters / 1e6
        classes = f"{self.num_classes:,} classes" if self.num_classes else "no classifier"
        return f"{self.name}  {num_params_m:.2f} M parameters, {classes}, license {self.license}"

    def transform(self) -> Callable[[Image.Image], Tensor]:
        """Return the preprocessing of an image, without the normalisation: RGB -> uint8 [3, size, size]."""
        return evaluation_transform(
            size=self.size,
            crop=self.crop,
            interpolation=self.interpolation,
            crop_mode=self.crop_mode,
            mean=self.mean,
        )


def open_network(
    source: str,
    *,
    weights: Weights = "model",
    image_size: int | None = None,
    needs_classes: bool = False,
    size_key: str = "--image-size",
) -> Network:
    """Open `run:PATH`, `local-dir:PATH`, `timm:NAME`, `hf-hub:ID`, or the folder of a run or of an export.

    weights: `ema` for the moving average of a run. image_size: overrides the network's own; positions are resampled.
    needs_classes: reject a network without a classifier before its weights are loaded. size_key: the option that sets
    image_size, for errors. Raises ConfigError for an unknown kind of source or a missing classifier; DataError for
    weights that cannot be loaded.
    """
    kind, name = _kind_and_name(source)
    if weights == "ema" and kind != "run":
        raise ConfigError(f"{source} has no moving average of its weights", "leave out --ema: only runs keep one")
    if kind == "run":
        return _open_run(name, weights, image_size, needs_classes, size_key)
    return _open_timm(kind, name, image_size, needs_classes, size_key)


def _kind_and_name(source: str) -> tuple[str, str]:
    """Split `source` into kind and name: ("timm", "resnet18"), ("run", "runs/a")."""
    kind, _, name = source.partition(":")
    if name and kind in KINDS:
        return kind, name
    folder = Path(source).expanduser()
    if (folder / "run.json").is_file():
        return "run", source
    if (folder / "config.json").is_file():
        return "local-dir", str(folder)
    if folder.is_dir():
        raise ConfigError(
            f"{source} is neither a run (it has no run.json) nor an export (no config.json)",
            "name the folder that tools/finetune.py or tools/export.py wrote",
        )
    remedy = "use run:PATH, local-dir:PATH, timm:NAME, hf-hub:ID, or the folder of a run or an export"
    if timm.is_model(source):
        remedy = f"did you mean timm:{source}?"
    raise ConfigError(f"{source} is neither a folder nor a kind of model and its name", remedy)


def _open_run(path: str, weights: Weights, image_size: int | None, needs_classes: bool, size_key: str) -> Network:
    """Open the network of a run folder, pre-trained or fine-tuned."""
    name = f"run:{path}"
    _, facts = read_facts(path)
    if needs_classes and facts["stage"] != "finetune":
        raise _no_classifier(name)
    if image_size:
        with torch.device("meta"):
            shape = timm.create_model(facts["network"]["name"], **facts["network"]["arguments"])
        _require_multiple(name, shape, image_size, size_key)
    saved = open_saved(path, weights=weights, image_size=image_size)
    seen = saved.facts["input"]
    return Network(
        module=saved.vit,
        name=f"{name} {saved.checkpoint.name}{' (ema)' if weights == 'ema' else ''}",
        mean=tuple(seen["mean"]),
        std=tuple(seen["std"]),
        size=image_size or seen["size"],
        crop=seen["crop"],
        interpolation="bicubic",
        crop_mode="center",
        num_classes=saved.vit.num_classes,
        license=saved.facts["license"],
        classes=tuple(saved.facts.get("classes") or ()),
    )


def _open_timm(kind: str, name: str, image_size: int | None, needs_classes: bool, size_key: str) -> Network:
    """Open any model that timm can open, with the preprocessing that timm states."""
    source = f"{kind}:{name}"
    if kind == "timm" and not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ConfigError(f"timm has no model {name!r}", f"names near it: {', '.join(near) or 'none'}")
    address = name if kind == "timm" else source
    try:
        require_moderate_network(address)
        with torch.device("meta"):  # takes neither memory nor time, and loads no weights
            shape = timm.create_model(address, pretrained=False)
        if needs_classes and not shape.num_classes:
            raise _no_classifier(source)
        if image_size:
            _require_multiple(source, shape, image_size, size_key)
        takes_size = "img_size" in inspect.signature(type(shape)).parameters  # other networks accept any size
        keywords = {"img_size": image_size} if image_size and takes_size else {}
        network = timm.create_model(address, pretrained=True, **keywords)
    except ConfigError:
        raise
    except (HfHubHTTPError, *READ_ERRORS) as error:
        raise DataError(
            f"{source} cannot be opened ({why_unreadable(error)})",
            "check its name, the network, and the image size if you gave one; or download it and use local-dir:PATH",
        ) from error
    return _with_input_of_timm(network.eval(), source, image_size)


def _with_input_of_timm(network: nn.Module, name: str, image_size: int | None) -> Network:
    seen: dict[str, Any] = resolve_model_data_config(network)
    if list(seen["input_size"])[:1] != [3] or len({*seen["input_size"][1:]}) != 1:
        size = " x ".join(map(str, seen["input_size"]))[:60]
        raise ConfigError(f"{name} looks at {size} pixels", "use a model of square images with 3 channels")
    checked = image_config(seen, name)
    return Network(
        module=network,
        name=name,
        mean=checked.mean,
        std=checked.std,
        size=image_size or checked.input_size[1],
        crop=checked.crop_pct,
        interpolation=checked.interpolation,
        crop_mode=checked.crop_mode,
        num_classes=network.num_classes,
        license=str(network.pretrained_cfg.get("license") or "not stated"),
        classes=tuple(map(str, network.pretrained_cfg.get("label_names") or ())),
    )


def _require_multiple(name: str, network: nn.Module, image_size: int, size_key: str) -> None:
    """Raise ConfigError unless patches cover the whole image: timm would ignore the last rows and columns."""
    patches = getattr(network, "patch_embed", None)
    cuts_off = isinstance(patches, PatchEmbed) and not patches.dynamic_img_pad
    patch_size = patches.patch_size[0] if cuts_off else 1
    if image_size % patch_size:
        raise ConfigError(
            f"{name} looks at patches of {patch_size} pixels, which do not divide images of {image_size}",
            f"use a multiple, e.g. {size_key}={max(1, round(image_size / patch_size)) * patch_size}",
        )


def _no_classifier(name: str) -> ConfigError:
    return ConfigError(
        f"{name} has no classifier, it is an encoder alone",
        f"fine-tune it and evaluate that run: tools/finetune.py CONFIG init.source={name}; "
        "or judge its features: tools/evaluate.py probe, or knn",
    )
