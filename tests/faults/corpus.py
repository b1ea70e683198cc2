"""Bad and hostile files, built in code: tars, indexes, images, weights, pickles, run folders.

A file of a case is its bytes, its text, or a function `(path, good)` that makes it, where `good` is a folder of good
shards and runs. Hostile ones would create the folder `../../canary` beside all cases if anything of them ran.
"""

import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays
from safetensors.torch import load_file, save_file
from torch import Tensor

from maedistill.config.render import config_yaml
from maedistill.data.shards.open_index import open_index
from maedistill.models.initialize import initialize
from maedistill.models.vits import build_vit
from maedistill.runs.checkpoint import take_snapshot, write_snapshot
from maedistill.runs.folder import RunFolder
from maedistill.training.engine import MOMENTS, TrainingState
from tests.data.pictures import encode, png_of
from tests.support.checkpoints import renew_manifest

Make = Callable[[Path, Path], object]
File = bytes | str | Make
CANARY = "../../canary"  # from the working directory of a case


class Trap:
    """Creates the canary when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (CANARY,)


# -- images --


def picture(kind: str = "PNG") -> bytes:
    """A gradient of 32 x 32 pixels."""
    row, column = np.mgrid[0:32, 0:32] * 8
    return encode(Image.fromarray(np.stack([row, column, (row + column) // 2], axis=-1).astype(np.uint8)), kind)


def png(width: int, height: int, *, depth: int = 8, rows: bytes = b"") -> bytes:
    """A PNG of RGB pixels that says it has this size, whatever its rows hold."""
    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    return png_of([(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")])


# -- tars and their indexes --


def tar(
    members: dict[str, bytes] | list[tuple[str, bytes]], *, mode: str = "w", kind: bytes = tarfile.REGTYPE
) -> bytes:
    """A tar of these members; `kind` is the tar type of the first, e.g. a link to /etc/passwd."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=tarfile.USTAR_FORMAT) as file:
        for number, (name, data) in enumerate(members.items() if isinstance(members, dict) else members):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if number == 0 and kind != tarfile.REGTYPE:
                info.type, info.size, info.linkname = kind, 0, "/etc/passwd"
            file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def samples(
    count: int = 20, *, image: bytes = picture(), suffix: str = "png", label: bytes | None = None
) -> dict[str, bytes]:
    """Return members 000.png, 000.cls, ...; labels 0, 1, 2, 0, ... or `label` for all."""
    members = {}
    for i in range(count):
        members[f"{i:03d}.{suffix}"] = image
        members[f"{i:03d}.cls"] = str(i % 3).encode() if label is None else label
    return members


def unlabelled(image: bytes, *, suffix: str = "png", last: bytes | None = None) -> bytes:
    """A shard of 20 images without labels; `last` takes the place of the one but last."""
    members = {f"{i:03d}.{suffix}": image for i in range(20)}
    return tar(members if last is None else members | {f"018.{suffix}": last})


def index(**changes: Any) -> Make:
    """The index of bad.tar beside it, changed: arrays by name, and the text with everything else.

    A change is the new value, or a function of the old one.
    """

    def make(path: Path, _: Path) -> None:
        open_index(str(path.with_name("bad.tar")))
        data = path.read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        text = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["index"])
        entries = {name: array.copy() for name, array in load_arrays(data).items()} | text
        for name, value in changes.items():
            entries[name] = value(entries[name]) if callable(value) else value
        entries["made"] = {"made_by": "somebody"}  # a scan's own index would be made again
        arrays = {name: entries.pop(name) for name in list(entries) if name not in text}
        path.write_bytes(save_arrays(arrays, {"index": json.dumps(entries)}))

    return make


def header(tensors: dict[str, Any], *, length: int | None = None, text: str = "{}") -> bytes:
    """A safetensors file whose header says `tensors`, or that its header has `length` bytes; and no tensor at all."""
    said = json.dumps({"__metadata__": {"index": text}} | tensors).encode()
    return struct.pack("<Q", len(said) if length is None else length) + said


# -- weights and run folders --

TINY = {"width": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
TINY_EXPORT = """\
{"architecture": "vit_tiny_patch16_224", "num_classes": 0, "pretrained_cfg": {"license": "mit"},
"model_args": {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "img_size": 32}}
"""


def weights(**changes: Tensor | None) -> dict[str, Tensor]:
    """A tiny ViT's, with some tensors changed, or left out where None; dots are written as __."""
    named = {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in (_tiny() | named).items() if value is not None}


@cache
def _tiny() -> dict[str, Tensor]:
    vit = build_vit("vit_tiny_patch16_224", image_size=32, **TINY)
    initialize(vit, seed=0)
    return vit.state_dict()


def pth(content: Any, *, zipped: bool = True) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def bare_pickle(content: Any) -> bytes:
    """A pickle without anything around it."""
    return pickle.dumps(content, protocol=2)


def folder(**files: File) -> Make:
    """A folder of these files; dots are written as __."""

    def make(path: Path, good: Path) -> None:
        path.mkdir()
        for name, content in files.items():
            write(path / name.replace("__", "."), content, good)

    return make


def copy_of(name: str, change: Callable[[Path], object] = lambda run: None) -> Make:
    """A copy of one of the good folders, changed."""

    def make(path: Path, good: Path) -> None:
        shutil.copytree(good / name, path)
        change(path)

    return make


def newest(run: Path) -> Path:
    """The newest checkpoint of a run."""
    return max((run / "checkpoints").glob("step_*"))


def edit_json(file: str, **changes: Any) -> Callable[[Path], object]:
    """Change some keys of a JSON file in a run folder; dots in keys are written as __."""

    def change(run: Path) -> None:
        document = json.loads((run / file).read_text())
        for name, value in changes.items():
            *sections, leaf = name.split("__")
            below = document
            for section in sections:
                below = below[section]
            below[leaf] = value
        (run / file).write_text(json.dumps(document))

    return change


def edit_weights(file: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], object]:
    """Change a safetensors file of the newest checkpoint and renew the manifest: every checksum holds."""

    def edit(run: Path) -> None:
        where = newest(run)
        save_file(change(load_file(where / file)), where / file)
        renew_manifest(where)

    return edit


def flip(file: str, place: int) -> Callable[[Path], object]:
    """Change one byte of a file in the newest checkpoint."""

    def change(run: Path) -> None:
        path = newest(run) / file
        data = bytearray(path.read_bytes())
        data[place] ^= 1
        path.write_bytes(data)

    return change


def link(target: str) -> Make:
    """A symbolic link."""
    return lambda path, _: path.symlink_to(target)


def sparse(size: int) -> Make:
    """A file that says it has so many bytes, and takes none."""

    def make(path: Path, _: Path) -> None:
        path.touch()
        os.truncate(path, size)

    return make


def imitated_run(parts: Any, path: Path) -> None:
    """A run folder as the tools leave it after one step, with Adam's moments at zero."""
    run = RunFolder(path)
    run.path.mkdir()
    run.config.write_text(config_yaml(parts.config))
    (path / "run.json").write_text(json.dumps(parts.metadata | {"starts": []}))
    tensors = {name: value.detach().clone() for name, value in parts.module.state_dict().items()}
    moments = {kind: {name: torch.zeros_like(p) for name, p in parts.module.named_parameters()} for kind in MOMENTS}
    engine = SimpleNamespace(state=lambda: TrainingState(tensors, moments, {"updates": 1.0}))
    loop = {"step": 1, "bad_samples": 0, "trained_seconds": 1.0}
    write_snapshot(run.checkpoints, take_snapshot(step=1, engine=engine, state=loop), keep=1)


def write(path: Path, content: File, good: Path) -> None:
    """Make one file of a case."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content)
    else:
        content(path, good)


def zip_bomb(path: Path, _: Path) -> None:
    """A .pth with a storage of 200 MB of zeros, compressed to a thousandth. (Ten thousand such could be in it.)"""
    with zipfile.ZipFile(io.BytesIO(pth(weights(norm__bias=torch.zeros(1000))))) as whole:
        entries = {entry: whole.read(entry) for entry in whole.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as bomb:
        for name, data in entries.items():
            bomb.writestr(name, bytes(200_000_000) if len(data) == 4000 else data)


def bytes_bomb() -> bytes:
    """A pickle of a bytearray of 4 TB, which torch's own reader would build."""
    return b"\x80\x02cbuiltins\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x04\x85R."


def itself() -> dict[str, Any]:
    """A mapping whose `model` is the mapping."""
    content: dict[str, Any] = {"state_dict": {}}
    content["model"] = content
    return content
