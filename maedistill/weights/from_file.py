"""Build a plain ViT, named or inferred from the shapes, and fill it from a weights file, which is untrusted input.

a.safetensors, a.pth -> read_weights_file -> its content: usually a dict of tensors, possibly nested in another dict
the file, an EncoderSpec -> open_file -> the network, whatever style of keys the file has

No code of a file is executed, and the sizes that it states are not trusted.
"""

import hashlib
import os
import re
import struct
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.serialization import safe_globals

from maedistill.errors import DataError
from maedistill.models.meta import meta_device
from maedistill.models.vits import PlainViT, TimmModel, build_vit, require_known
from maedistill.weights.recognize import Recognized, grid_of, prefix_tokens, recognize
from maedistill.weights.state_dict import import_weights, load_classifier, load_encoder

# Called with a network that holds no weights yet: raises if it does not serve, and returns the image size to open it
# at, or None for its own.
Inspect = Callable[[TimmModel], int | None]
# Errors that reading a truncated or damaged file, or one without weights, may raise, depending on the damage.
READ_ERRORS = (
    SafetensorError, UnpicklingError, zipfile.BadZipFile, OSError, RuntimeError, EOFError, ValueError, LookupError,
    TypeError, AttributeError, AssertionError, MemoryError, struct.error,
)  # fmt: skip
# First bytes, in lower case, of files that are often downloaded in place of weights, and what they are.
_MISTAKEN = {b"<!doctype": "a web page", b"<html": "a web page", b"version https://git-lfs": "a pointer of Git LFS"}


@dataclass(frozen=True)
class EncoderSpec:
    """What a `file:` or `random:` source does not state: a timm model, and what differs from it (see `build_vit`).

    model: of a file, by default read off its shapes; a random source names it itself. pos_embed: the fixed table of a
    file that stores no positions, computed for the grid at hand, or of random weights, where None is sincos2d.
    sha256: the file's expected checksum. eps: of the norms, where they are not the model's.
    """

    model: str | None = None
    width: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    patch_size: int | None = None
    class_token: bool | None = None
    register_tokens: int | None = None
    mlp_ratio: float | None = None
    pos_embed: str | None = None
    sha256: str | None = None
    eps: float | None = None

    def build(
        self, pos_embed: str, inspect_network: Inspect, *, grid: int | None = None, num_classes: int = 0
    ) -> PlainViT:
        """Build the encoder, uninitialised, for images of the size that `inspect_network` chooses.

        grid: of patches, for the network's own size; None if it is not known: timm's size, or with other patches than
        timm's, 16 of them. num_classes: that it will have.
        """
        assert self.model is not None
        require_known(self.model)
        shape = {name: value for name, value in asdict(self).items() if name not in ("pos_embed", "sha256", "eps")}
        with meta_device():
            usual: TimmModel = timm.create_model(self.model, pretrained=False).patch_embed
            patch = self.patch_size or usual.patch_size[0]
            size = 16 * patch if patch != usual.patch_size[0] else usual.img_size[0]
            own = build_vit(image_size=grid * patch if grid else size, **shape)
        own.num_classes = num_classes
        image_size = inspect_network(own) or own.patch_embed.img_size[0]
        return build_vit(image_size=image_size, pos_embed=pos_embed, **shape)


SPEC_FIELDS = {field.name for field in fields(EncoderSpec)}


def open_file(
    path: str,
    spec: EncoderSpec,
    inspect_network: Inspect,
    *,
    section: str | None,
    weights: str = "model",
    classifies: bool = False,
) -> tuple[PlainViT, str]:
    """Load a weights file; return the network and which keys were loaded. section: the config section, for errors.

    The file determines whether there is a class token, how many registers a model with registers has if the spec does
    not say it, and all that the spec leaves open if it names no model.
    weights: see `choose_entry`. classifies: keep the classifier of a file of transformers. Without a section, a network
    that is no bare encoder has no final norm if the file has none. Raises DataError if the file cannot be read safely,
    or if its keys do not fit the network; ConfigError if its architecture cannot be told.
    """
    where = section or "teacher"
    content = read_weights_file(path, sha256=spec.sha256, section=where)
    key = f"{section}.weights" if section else "--weights"
    imported = import_weights(content, name=path, weights=weights, weights_key=key)
    encoder, note = imported.part("encoder.vit."), imported.note
    class_token, registers = prefix_tokens(encoder)
    if spec.model is None:
        found = recognize(encoder, imported.foreign, name=path, section=section, num_heads=spec.num_heads)
        shape = {name: value for name, value in asdict(found).items() if name in SPEC_FIELDS}
        given = {name: value for name, value in asdict(spec).items() if value is not None}
        spec, note = EncoderSpec(**shape | given), f"{note}{found.describe()}{_doubt(found, note)}; "
    elif spec.register_tokens is None and registers and _has_registers(spec.model):
        spec = replace(spec, register_tokens=registers)
    spec = replace(spec, class_token=class_token)
    classifier = imported.part("classifier.") if classifies and imported.eps and spec.class_token else {}
    num_classes = classifier["bias"].numel() if len(classifier) == 2 else 0
    vit = spec.build(spec.pos_embed or "learned", inspect_network, grid=grid_of(encoder), num_classes=num_classes)
    fixed = spec.pos_embed is not None
    audit = load_encoder(vit, imported, name=path, section=where, optional=("norm.",), fixed_positions=fixed)
    if section is None and classifies and {"norm.weight", "norm.bias"} <= {*audit.absent}:
        vit.norm = nn.Identity()  # what is evaluated is the file's network, and a norm of no training is no part of it
        note += "no final norm; "
    if num_classes:  # added once the encoder is known to fit: its size is not trusted before
        load_classifier(vit, classifier, audit, name=path)
    return vit, f"{note}{audit}, {_set_eps(vit, spec.eps, imported.eps)}"


def _doubt(found: Recognized, note: str) -> str:
    """Return a warning of heads that are assumed, where the names of a file's networks are those of MoCo v3."""
    is_moco = "momentum_encoder" in note and found.width == 384 and not found.heads_known
    return " (warning: MoCo v3's ViT-S has 12)" if is_moco else ""


def _has_registers(model: str) -> bool:
    """Return whether timm's `model` has registers. Positions of one without have another shape."""
    require_known(model)
    with meta_device():
        return getattr(timm.create_model(model, pretrained=False), "reg_token", None) is not None


def _set_eps(vit: PlainViT, stated: float | None, usual: float | None) -> str:
    """Set the eps of the norms where it is not timm's, and say which one it is.

    stated: by the source. usual: in transformers, if the file has its names.
    """
    norms: list[Any] = [module for module in vit.modules() if isinstance(getattr(module, "eps", None), float)]
    eps = stated or usual or norms[0].eps
    for norm in norms:
        norm.eps = eps
    return f"norm eps {eps:g}" + ("" if stated else " as in transformers" if usual else " as in timm")


def read_weights_file(path: str | Path, *, sha256: str | None = None, section: str = "teacher") -> object:
    """Return the content of a .safetensors or .pth file. Pickles are read weights-only, so their code cannot run.

    sha256: the file's expected checksum, if known. section: the config section that names the file, for errors.
    Raises DataError if the file is missing, damaged, unsafe, or not a weights file.
    """
    path = Path(os.path.expanduser(path))  # unlike Path.expanduser, it never raises
    if os.path.isdir(path):
        raise DataError(f"{path}: a folder, not a file", "name a file in it, or use local-dir:PATH")
    if not os.path.isfile(path):
        raise DataError(f"{path}: no such file", "check the path of the weights")
    if not os.access(path, os.R_OK):
        raise DataError(f"{path}: this user may not read it", "change its permissions, or use a copy")
    if sha256 is not None:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != sha256:
            raise DataError(
                f"{path}: its sha256 is {digest}, not {section}.sha256", "download the file again, or fix the key"
            )
    with path.open("rb") as file:
        head = file.read(64).lstrip().lower()
    if kind := next((kind for start, kind in _MISTAKEN.items() if head.startswith(start)), None if head else "empty"):
        raise DataError(f"{path}: it is {kind}, not weights", "download the file again")
    try:
        require_honest_zip(path)
        if path.suffix == ".safetensors":
            return load_file(path)
        # MAE's and AMD's checkpoints also hold the script's arguments, a Namespace; torch warns of unusual pickles.
        with safe_globals([Namespace]), warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except READ_ERRORS as error:
        raise DataError(
            f"{path}: cannot be read as plain weights ({why_unreadable(error)})",
            "use a .safetensors file, or a .pth of tensors and plain values (pickled objects are refused)",
        ) from error


def why_unreadable(error: Exception) -> str:
    """Return the informative line of a read error. torch's messages begin with advice to trust the file."""
    if isinstance(error, FileNotFoundError) and (path := error.filename or str(error).partition(": ")[2]):
        return f"{path} may not be read" if os.path.exists(path) else f"there is no {path}"  # safetensors: not found
    if "Weights only load failed" in str(error) and "GLOBAL" not in str(error):
        return "it holds no tensors that torch saved"
    text = str(error).replace("Error(s) in loading state_dict for", "the weights do not fit").replace(":\n\t", ": ")
    lines = [line.strip() for line in text.splitlines() if line.strip() and "file an issue" not in line]
    telling = [line.rpartition("Unpickler error: ")[2] for line in lines if re.search("GLOBAL|Unpickler error", line)]
    return f"{type(error).__name__}: {(telling or lines or ['no more is known'])[0][:200]}"


def require_honest_zip(path: Path) -> None:
    """Raise ValueError for a zip that would unpack to more bytes than it has.

    torch writes zips without compression, but its reader allocates whatever size a compressed entry states.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return
        total = sum(entry.file_size for entry in zipfile.ZipFile(file).infolist())
    if total > path.stat().st_size:
        raise ValueError(f"a zip of {path.stat().st_size:,} bytes that would unpack to {total:,}")
