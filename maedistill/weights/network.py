"""A network of any source, opened, with its image preprocessing."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from timm.data import DEFAULT_CROP_PCT, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from maedistill.config.schema import Triple
from maedistill.data.loading.evaluation import evaluation_transform
from maedistill.errors import ConfigError
from maedistill.models.encoder import Encoder, as_encoder
from maedistill.models.maps import MapEncoder
from maedistill.models.vits import PlainViT, TimmModel
from maedistill.weights.from_file import why_unreadable
from maedistill.weights.graph import Graph


@dataclass(frozen=True, eq=False)
class Network:
    """A timm module for normalised images [B, 3, size, size], with or without a classifier, and its preprocessing."""

    module: TimmModel
    name: str
    size: int
    license: str
    own_size: int = 0  # of the images that it was trained on, before any resampling
    num_classes: int = 0  # 0 for an encoder without a classifier
    mean: Triple = IMAGENET_DEFAULT_MEAN
    std: Triple = IMAGENET_DEFAULT_STD
    normalization_known: bool = True  # False: ImageNet's mean and std are assumed
    crop: float = DEFAULT_CROP_PCT  # fraction of the shorter side that is kept
    interpolation: str = "bicubic"
    crop_mode: str = "center"
    exif: str = "ignore"  # or "apply": whether it saw photographs turned upright
    test_size: int | None = None  # for which timm's accuracy is published, with test_crop, where it is not `size`
    test_crop: float | None = None
    classes: tuple[str, ...] = ()  # names, position = label; empty if not known
    audit: str = ""  # which of its keys were loaded
    file_bytes: int = 0  # of a graph, and its number format, which is fixed: fp32 or int8
    precision: str = ""
    border: Triple | None = None  # of a graph that normalises by itself: its own mean, which pads in crop_mode border
    origin: Mapping[str, Any] | None = None  # of a run: what `Origin` names

    @property
    def parameters(self) -> int:
        """Return the number of parameters, of a graph the numbers that it holds."""
        if isinstance(self.module, Graph):
            return self.module.num_numbers
        return sum(parameter.numel() for parameter in self.module.parameters())

    @cached_property
    def encoder(self) -> Encoder:
        """Return the module, or a plain ViT, as an encoder of selected patches, which shares its weights."""
        return self.module if isinstance(self.module, MapEncoder) else as_encoder(self.module, self.name)

    def describe(self) -> str:
        """Describe the network in one line for the log: source, size, keys, normalisation, license."""
        vit, classes = self.module, f"{self.num_classes:,} classes" if self.num_classes else "no classifier"
        shape = f"{vit.embed_dim} x {len(vit.blocks)}, " if isinstance(vit, PlainViT) else ""
        assumed = "" if self.normalization_known else " (ImageNet's mean and std are assumed)"
        size = f"{shape}{self.parameters / 1e6:.2f} M parameters, {classes}"
        return f"{self.name}  {size}  {self.audit}  mean {self.mean}{assumed}  license {self.license}"

    def transform(self) -> Callable[[Image.Image], Tensor]:
        """Return the preprocessing of an image, without the normalisation: RGB -> uint8 [3, size, size]."""
        mean = self.border or self.mean
        return evaluation_transform(
            size=self.size, crop=self.crop, interpolation=self.interpolation, crop_mode=self.crop_mode, mean=mean
        )

    @torch.no_grad()
    def output(self, *, size_key: str = "--image-size") -> Tensor:
        """Return the module's output for one black image, so that an unsupported image size fails before any loader.

        The image is where the module is, and in its number format. size_key: the option that sets the image size, for
        errors. Raises ConfigError if the network does not run or gives something other than one row of numbers per
        image.
        """
        own = next(filter(torch.is_floating_point, self.module.parameters()), torch.zeros(()))
        try:
            output = self.module(own.new_zeros(1, 3, self.size, self.size))
        except (AssertionError, AttributeError, LookupError, RuntimeError, ValueError, TypeError) as error:
            raise ConfigError(
                f"{self.name} cannot take images of {self.size} pixels ({why_unreadable(error)})",
                f"name a size that it takes ({size_key}), for a ViT a multiple of its patch size, or leave it out",
            ) from error
        if not isinstance(output, Tensor) or output.ndim == 0:
            what = "a single number" if isinstance(output, Tensor) else f"a {type(output).__name__}"
            raise ConfigError(f"{self.name} gives {what}, not a tensor", "use a module whose output is a tensor [B, C]")
        return output
