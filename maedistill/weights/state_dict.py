"""Convert state dicts from other code bases: rename their keys to this package's, audit every key, take fingerprints.

Known are the keys of MAE, DMAE, AMD (VideoMAE's), timm, this package and others (`key_styles.py`), from safetensors or
weights-only pickles.
The result has the names of `methods/`: `encoder.vit.*` (timm's names), `decoder.*`, `projections.*`, `generators.*`.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor, nn

from maedistill.errors import DataError
from maedistill.models.vits import PlainViT
from maedistill.weights.entries import StateDict, choose_entry, quoted
from maedistill.weights.key_styles import TRANSFORMERS_EPS, merge_qkv, with_timm_names
from maedistill.weights.recognize import KEY_OF_MODEL, OTHER_KINDS, likely_model

# Keys that a file may hold but that are not needed: classifiers and pooling heads of fine-tuned models, iBOT's token of
# masked patches, the count of torch's AveragedModel, and norms of AMD's generators, which are never applied.
_DROPPED = re.compile(
    r"^((head|head_dist|fc_norm|attn_pool|pooler|generators\.\d+\.norm)\.|(masked_embed|n_averaged)$)"
)
_RENAMED = {  # the first match wins, so the order matters
    r"^(decoder\.(embed|blocks|norm|head|mask_token|pos_embed)\b.*)$": r"\1",  # this package, and AMD's decoder
    r"^(projections|generators)\.(.*)$": r"\1.\2",  # this package, and AMD's generators
    r"^mask_token$": "decoder.mask_token",
    r"^decoder_(pos_embed$|(?:embed|blocks|norm)\..*$)": r"decoder.\1",
    r"^decoder_pred\.(.*)$": r"decoder.head.\1",
    r"^(?:aligned_feature_projection_heads|projection_heads)\.(.*)$": r"projections.\1",  # DMAE, AMD
    r"^encoder_to_decoder\.(.*)$": r"decoder.embed.\1",
    r"^(classifier\.(?:weight|bias))$": r"\1",  # transformers
    r"^((cls_token|reg_token|pos_embed|patch_embed|blocks|norm|norm_pre|rope\.freqs)\b.*)$": r"encoder.vit.\1",
}


@dataclass(frozen=True)
class ConvertedStateDict:
    """The renamed weights, and the keys of the file that were dropped or not recognised.

    note: which of several networks of the file it is. eps: of its norms, where the style of its keys tells.
    """

    weights: StateDict
    dropped: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()
    note: str = ""
    eps: float | None = None

    def part(self, prefix: str) -> StateDict:
        """Return the weights below `prefix`, with the prefix removed: `part("encoder.vit.")` has timm's names."""
        return {name.removeprefix(prefix): value for name, value in self.weights.items() if name.startswith(prefix)}


@dataclass
class Audit:
    """Which of a model's keys a file filled. Printed at the start of a run, so that no key is ignored silently."""

    loaded: int = 0
    resampled: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)  # of the file: decoder, heads, classifier
    absent: list[str] = field(default_factory=list)  # of the model, missing from the file but not needed

    def __str__(self) -> str:
        parts = [f"{self.loaded} keys loaded"]
        for label in ("resampled", "unused", "absent"):
            if keys := getattr(self, label):
                groups = sorted({key.removeprefix("encoder.vit.").split(".")[0] for key in keys})
                parts.append(f"{len(keys)} {label} ({', '.join(groups)})")
        return ", ".join(parts)


def import_weights(
    content: object, *, name: str = "weights", weights: str = "model", weights_key: str = "--weights"
) -> ConvertedStateDict:
    """Rename the keys of a file's weights to this package's. name: the file's name in errors.

    weights, weights_key: which of its networks, and the setting that chooses, see `choose_entry`. Raises DataError if
    there are no tensors, if one is not plain, or for weights that do not fit square patches of colour images.
    """
    if not isinstance(content, dict):
        raise DataError(f"{name}: holds a {type(content).__name__}, not named weights", "use a state dict")
    entry = choose_entry(content, weights, name=name, key=weights_key)
    _require_plain(entry.weights | entry.others, name)
    of_transformers = any(key.startswith("embeddings.") for key in entry.weights)
    renamed: StateDict = {}
    dropped, foreign = [], []
    for key, value in with_timm_names(entry.weights, name).items():
        if _DROPPED.match(key):
            dropped.append(key)
        elif new := _new_name(key):
            renamed[new] = _image_kernel(value, name) if key == "patch_embed.proj.weight" else value
        else:
            foreign.append(key)
    # A decoder and heads, or networks that are not the chosen one.
    for key, value in merge_qkv(entry.others, name).items():
        new = None if _DROPPED.match(key) else _new_name(key)
        if new is None or new.startswith("encoder."):
            dropped.append(key)
        else:
            renamed[new] = value
    tokens = content.get("generator_mask_tokens")  # AMD stores them outside the model's state dict
    for i, token in enumerate(tokens if isinstance(tokens, list) else ()):
        renamed[f"generators.{i}.mask_token"] = token
    eps = TRANSFORMERS_EPS if of_transformers else None
    return ConvertedStateDict(renamed, tuple(dropped), tuple(foreign), entry.note, eps)


def load_encoder(
    vit: PlainViT,
    imported: ConvertedStateDict,
    *,
    name: str,
    section: str = "teacher",
    optional: Iterable[str] = (),
    fixed_positions: bool = False,
) -> Audit:
    """Load the encoder of `imported` into a timm `vit`; timm resamples positions and patches if sizes differ.

    optional: prefixes of keys that the file may lack (the final norm of a teacher that never runs that far).
    fixed_positions: the file may lack positions; the model's own table is kept. section: config section, for errors.
    Raises DataError if keys are unknown, missing, of another shape, or hold anything but finite numbers.
    """
    weights, expected = imported.part("encoder.vit."), vit.state_dict()
    _split_biases(weights, expected)
    audit = Audit(unused=[k for k in imported.weights if not k.startswith("encoder.vit.")] + list(imported.dropped))
    foreign = list(imported.foreign) + [k for k in weights if k not in expected]
    if foreign:
        only = OTHER_KINDS if section == "teacher" else "the file must hold a plain ViT's encoder"
        remedy = f"check the model's name and depth; {only}"
        if "reg_token" in foreign:
            remedy = f"name a model with registers, e.g. {KEY_OF_MODEL.get(section, 'model')}={likely_model(weights)}"
        raise DataError(f"{name}: {len(foreign)} keys belong to no ViT of this kind, e.g. {quoted(foreign)}", remedy)
    absent = [k for k in expected if k not in weights]
    audit.absent = [k for k in absent if k.startswith(tuple(optional)) or (fixed_positions and k == "pos_embed")]
    if missing := [k for k in absent if k not in audit.absent]:
        remedy = "check the model's name and dimensions"
        if "reg_token" in missing:
            remedy = f"name one without registers, e.g. {KEY_OF_MODEL.get(section, 'model')}={likely_model(weights)}"
        if missing == ["pos_embed"]:
            remedy = f"the file has no positions: name its fixed table, e.g. {section}.pos_embed=sincos1d for AMD's"
        raise DataError(f"{name}: {len(missing)} keys are missing, e.g. {quoted(missing)}", remedy)
    _fit_grid(vit, weights, expected, audit)
    for key, value in weights.items():
        if value.shape != expected[key].shape:
            raise DataError(
                f"{name}: {quoted([key])} is {tuple(value.shape)}, the model expects {tuple(expected[key].shape)}",
                "check the model's name and dimensions",
            )
    require_finite(weights, name)
    vit.load_state_dict(weights, strict=False)
    audit.loaded = len(weights)
    return audit


def load_classifier(vit: PlainViT, weights: StateDict, audit: Audit, *, name: str) -> None:
    """Give an encoder the classifier of its class token that transformers saved: weight [C, D], bias [C].

    Raises DataError if it does not fit, or holds anything but finite numbers.
    """
    weight, bias = weights["weight"], weights["bias"]
    if weight.shape != (bias.numel(), vit.embed_dim) or bias.ndim != 1:
        raise DataError(
            f"{name}: its classifier is {tuple(weight.shape)}, the encoder has {vit.embed_dim} features",
            "use the weights of a ViTForImageClassification",
        )
    require_finite(weights, name)
    vit.reset_classifier(len(weight), "token")
    vit.head.load_state_dict(weights)
    audit.loaded, audit.unused = audit.loaded + 2, [key for key in audit.unused if not key.startswith("classifier.")]


def require_finite(weights: Mapping[str, Tensor], name: str) -> None:
    """Raise DataError unless all weights hold finite floating-point numbers. name: their source, for errors."""
    for key, value in weights.items():
        if value.is_meta or not value.is_floating_point():
            content = "no numbers" if value.is_meta else str(value.dtype)
            raise DataError(f"{name}: {quoted([key])} holds {content}, not weights", "use the weights of a model")
        broken = int((~value.float().isfinite()).sum())
        if broken:
            raise DataError(
                f"{name}: {broken:,} of {value.numel():,} values of {quoted([key])} are not finite",
                "use weights from before that training diverged",
            )


def _require_plain(state: StateDict, name: str) -> None:
    """Raise DataError for tensors that the file does not really hold, before anything is computed on them."""
    for key, value in state.items():
        dense = value.layout == torch.strided and not value.is_nested and not value.is_quantized
        if not dense or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise DataError(
                f"{name}: {quoted([key])} is not a plain tensor of {tuple(value.shape)} numbers",
                "save it as one: tensor.to_dense().contiguous().clone()",
            )


def _split_biases(weights: StateDict, expected: StateDict) -> None:
    """Split biases of qkv in place where the model has those of queries and values alone, as timm's Eva does."""
    for key in [key for key in weights if key.endswith("attn.qkv.bias") and key not in expected]:
        q, v = key.replace("qkv.bias", "q_bias"), key.replace("qkv.bias", "v_bias")
        parts = weights[key].chunk(3)
        if {q, v} <= expected.keys() and len(parts) == 3 and not parts[1].any():
            del weights[key]
            weights |= {q: parts[0], v: parts[2]}


def _fit_grid(vit: PlainViT, weights: StateDict, expected: StateDict, audit: Audit) -> None:
    """Resample positions and patch weights in place if the file's grid or patch size differs from the model's."""
    positions, kernel = weights.get("pos_embed"), weights.get("patch_embed.proj.weight")
    prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    if positions is not None and positions.ndim == 3 and positions.shape[1] != expected["pos_embed"].shape[1]:
        patches = positions.shape[1] - prefix
        if patches > 0 and math.isqrt(patches) ** 2 == patches:  # any other table is rejected later
            grid = list(vit.patch_embed.grid_size)
            weights["pos_embed"] = resample_abs_pos_embed(positions, grid, num_prefix_tokens=prefix)
            audit.resampled.append("pos_embed")
    size = expected["patch_embed.proj.weight"].shape[2:]
    if kernel is not None and kernel.ndim == 4 and kernel.shape[2:] != size:
        weights["patch_embed.proj.weight"] = resample_patch_embed(kernel, list(size))
        audit.resampled.append("patch_embed.proj.weight")


def _new_name(key: str) -> str | None:
    """Return this package's name of a key; None if it has none."""
    pattern = next((pattern for pattern in _RENAMED if re.match(pattern, key)), None)
    return re.sub(pattern, _RENAMED[pattern], key) if pattern else None


def _image_kernel(kernel: Tensor, name: str) -> Tensor:
    """Return patch weights [D, 3, p, p], of a single frame if they are a video model's; refuse any others."""
    if kernel.ndim == 5:  # [D, 3, frames, p, p]
        if kernel.shape[2] != 1:
            raise DataError(
                f"{name}: patches span {kernel.shape[2]} video frames",
                "use a teacher that was trained on images; video tubelets have no image counterpart",
            )
        kernel = kernel[:, :, 0]
    if kernel.ndim == 4 and (kernel.shape[1] != 3 or kernel.shape[2] != kernel.shape[3]):
        raise DataError(
            f"{name}: its patches have {kernel.shape[1]} channels of {kernel.shape[2]} x {kernel.shape[3]} pixels",
            "use a network of colour images (3 channels) with square patches",
        )
    return kernel


def weights_fingerprint(network: nn.Module) -> str:
    """Return SHA-256 over the names, shapes and bytes of all weights and buffers, on any device: 0.6 s for a ViT-L.

    A resumed run checks with it that its teacher has not changed. Names with `pos` are left out: position tables may
    have been resampled, and resampling is not bit-identical on every machine.
    """
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        if "pos" not in name:
            digest.update(f"{name} {tuple(value.shape)} {value.dtype} ".encode())
            digest.update(value.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
