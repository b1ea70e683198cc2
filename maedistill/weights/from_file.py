"""Build a plain ViT whose architecture is told: from a weights file in any known key style, or with random weights."""

from dataclasses import dataclass, fields, replace

import torch
from timm.models.vision_transformer import VisionTransformer

from maedistill.models.encoder import build_vit
from maedistill.models.initialize import initialize
from maedistill.weights.from_timm import Inspect
from maedistill.weights.state_dict import Audit, import_weights, load_encoder
from maedistill.weights.weights_file import read_weights_file


@dataclass(frozen=True)
class EncoderSpec:
    """What a `file:` or `random:` source does not state: a timm model, and what differs from it (see `build_vit`).

    model: of a file; a random source names it itself. pos_embed: the fixed table of a file that stores no positions, or
    of random weights, where None is sincos2d. sha256: the file's expected checksum.
    """

    model: str | None = None
    width: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    patch_size: int | None = None
    class_token: bool | None = None
    register_tokens: int | None = None
    pos_embed: str | None = None
    sha256: str | None = None

    def build(self, pos_embed: str, inspect_network: Inspect) -> VisionTransformer:
        """Build the network, uninitialised, for images of the size that `inspect_network` chooses."""
        assert self.model is not None
        shape = {"width": self.width, "depth": self.depth, "num_heads": self.num_heads, "patch_size": self.patch_size}
        shape |= {"class_token": self.class_token, "register_tokens": self.register_tokens}
        with torch.device("meta"):
            unsized = build_vit(self.model, image_size=16 * self.patch_size if self.patch_size else 224, **shape)
        return build_vit(self.model, image_size=inspect_network(unsized), pos_embed=pos_embed, **shape)


SPEC_FIELDS = {field.name for field in fields(EncoderSpec)}


def open_file(
    path: str, spec: EncoderSpec, inspect_network: Inspect, *, section: str
) -> tuple[VisionTransformer, Audit]:
    """Load a weights file. It determines whether there is a class token. section: the config section, for errors.

    Raises DataError if the file cannot be read safely, or if its keys do not fit the network.
    """
    imported = import_weights(read_weights_file(path, sha256=spec.sha256, section=section), name=path)
    spec = replace(spec, class_token="cls_token" in imported.part("encoder.vit."))
    vit = spec.build(spec.pos_embed or "learned", inspect_network)
    fixed = spec.pos_embed is not None
    return vit, load_encoder(vit, imported, name=path, section=section, optional=("norm.",), fixed_positions=fixed)


def random_network(spec: EncoderSpec, inspect_network: Inspect) -> VisionTransformer:
    """Build a network with the same random weights every time."""
    vit = spec.build(spec.pos_embed or "sincos2d", inspect_network)
    initialize(vit, seed=0)
    return vit
