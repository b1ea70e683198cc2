"""Export a run's network to a folder that opens without this package: timm's format, graphs, and the model card.

    RUN/run.json + newest intact checkpoint -> timm network -> OUT.tmp/ -> opened again and compared -> OUT/

OUT holds model.safetensors and config.json (timm's), or graphs (graph.py, int8.py) with preprocess.json; README.md
(see card.py); and export.json, which records what was exported and how it was verified. Only the encoder is exported,
with its classifier if the run is fine-tuned, but no decoder, projection or generator. OUT.tmp is renamed to OUT only
after `timm.create_model("local-dir:OUT.tmp", pretrained=True)` has reproduced the outputs of the checkpoint bit for
bit, and each graph has to 1e-4.

    B batch   P prefix tokens   N patches   D width   C outputs   s image side
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from safetensors import SafetensorError
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer

from maedistill.durable import require_local, sync
from maedistill.errors import ConfigError, DataError
from maedistill.escaping import without_paths
from maedistill.exporting.card import model_card
from maedistill.exporting.graph import GRAPH_FILES, write_graphs
from maedistill.exporting.int8 import INT8_FILE, Int8Spec, quantise
from maedistill.models.vits import PlainViT, TimmModel, pooled_norm
from maedistill.runs.folder import RunFolder
from maedistill.runs.manifest import COMPLETE, follow_umask
from maedistill.weights.from_graph import PREPROCESSING, Preprocessing
from maedistill.weights.from_onnx import TO_WRITE, require_onnx
from maedistill.weights.from_run import RunNetwork, Weights, open_run

Pooling = Literal["avg", "token"]
RECORD = "export.json"
FORMATS = ("timm", *GRAPH_FILES)
NETWORK_FILES = {"timm": "config.json", **GRAPH_FILES, "int8": INT8_FILE}  # what opens each format
FILES = {"config.json", "model.safetensors", "README.md", PREPROCESSING, RECORD}  # all that an export may hold
FILES |= {*NETWORK_FILES.values(), *(f"scorecard_{name}.json" for name in NETWORK_FILES)}
# Entries of timm's config for the architecture that are kept. The others (tag, license, paper, labels) describe the
# weights that timm publishes under this name, and would be wrong for these weights.
_ARCHITECTURE = ("architecture", "input_size", "fixed_input_size", "pool_size", "first_conv", "classifier")
_IMAGES = 2  # of random pixels, for comparing the written folder with the run


def export(
    run: str | Path,
    out: str | Path | None = None,
    *,
    weights: Weights = "model",
    global_pool: Pooling | None = None,
    exit: int | None = None,
    peer: int = 0,
    formats: Sequence[str] = ("timm",),
    with_preprocessing: bool = False,
    int8: Int8Spec | None = None,
    needs_classifier: bool = False,
    before_work: Callable[[], None] = lambda: None,
) -> Path:
    """Write the network of a run folder to `out`, by default RUN/export, and return that folder.

    weights: `ema` for the moving average. exit: the block of an exit at which the network ends, for a fine-tuned one;
    then to RUN/export_exitBLOCK. peer: a student of mutual learning; then to RUN/export_peerN. global_pool: the output
    of a pre-trained student, [B, D], after its own norm: `avg`, the mean of the patch tokens (the default), or `token`,
    the class token. A fine-tuned network is exported unchanged, with its classifier: [B, C]. An earlier export in `out`
    is replaced. formats: `timm`, `onnx`, `torch_export`. with_preprocessing: graphs take pixels, uint8, and normalise
    them. int8: also quantise the ONNX graph. needs_classifier: refuse a run without one. before_work: called once the
    rest is checked, before anything is written.
    Raises ConfigError if `out` holds anything else or is in a checkpoint, or the network does not support the pooling;
    DataError if the folder is not a run, lacks these weights, or `out` cannot be written, or if a format does not give
    the run's outputs.
    """
    kinds = [kind for kind in FORMATS if kind in formats or (int8 and kind == "onnx")]
    if unknown := sorted({*formats} - {*FORMATS}):
        raise ConfigError(f"--format: there is no {unknown[0]!r}", f"use {', '.join(FORMATS)}, separated by commas")
    if with_preprocessing and kinds == ["timm"]:
        raise ConfigError("--with-preprocessing: only graphs can normalise images", "add --format onnx or torch_export")
    folder = RunFolder(run)
    # Normalise first: `new/..` does not exist and would pass as free, but would then replace the current folder.
    part = (f"_peer{peer}" if peer else "") + (f"_exit{exit}" if exit is not None else "")
    default = folder.path / f"export{part}"
    out = Path(os.path.normpath(os.path.expanduser(out))) if out is not None else default
    require_local(out, "--out")
    try:
        if inside := next((one for one in out.resolve().parents if (one / COMPLETE).is_file()), None):
            raise ConfigError(
                f"{inside} is a checkpoint, which its run may remove with everything in it",
                "name a folder elsewhere: --out FOLDER",
            )
        if "onnx" in kinds:
            require_onnx(*TO_WRITE)
        _require_free(out)
        saved = open_run(folder.path, weights=weights, exit=exit, peer=peer)
        if (needs_classifier or int8) and not saved.vit.num_classes:
            raise ConfigError(
                f"{folder.path} has no classifier, whose accuracy could be measured (--val, --int8)",
                "export a fine-tuned run, or leave these out; maedistill evaluate probe or knn judges features",
            )
        license_text = without_paths(saved.metadata["license"], word=True)
        saved = replace(saved, metadata={**saved.metadata, "license": license_text})
        vit = with_pooling(saved, global_pool)
        before_work()
        _replace(out.resolve(), lambda folder: _fill(folder, saved, vit, weights, kinds, with_preprocessing, int8))
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"the export cannot be written to {out}: {error}",
            "free disk space, check permissions, or use another --out",
        ) from error
    return out


def read_record(out: Path) -> dict[str, Any]:
    """Read export.json: what was exported, with which versions, and how far its outputs are from the run's.

    max_difference, values: of timm, and how many numbers were compared. graphs: the distance of each graph.
    """
    return json.loads((out / RECORD).read_text(encoding="utf-8"))


def _require_free(out: Path) -> None:
    """Raise ConfigError unless `out` is new, an empty folder, or an earlier export to which no file was added."""
    if not out.exists():
        return
    if out.resolve() == Path.cwd():
        raise ConfigError(f"{out} is the working directory, which cannot be replaced", "use another --out")
    names = {path.name for path in out.iterdir()} if out.is_dir() else {out.name}
    if names and not (RECORD in names and names <= FILES):
        others = sorted(names - FILES) or sorted(names)
        raise ConfigError(f"{out} holds something other than an export ({', '.join(others[:3])})", "use another --out")


def _replace(out: Path, fill: Callable[[Path], None]) -> None:
    """Fill a temporary folder beside `out`, then rename it to `out`. Nothing else in the parent folder is touched."""
    temporary, retired = (out.with_name(f"{out.name}{suffix}") for suffix in (".tmp", ".old.tmp"))
    for leftover in (temporary, retired):  # of an export that was killed
        if not os.path.lexists(leftover):
            continue
        if leftover.is_symlink() or not leftover.is_dir() or not {path.name for path in leftover.iterdir()} <= FILES:
            raise FileExistsError(f"{leftover} is in the way, and is not what an export leaves")
        if leftover == retired and not out.exists() and (retired / RECORD).is_file():
            retired.rename(out)  # the export before that one, which had lost its name already
        else:
            shutil.rmtree(leftover)
    try:
        temporary.mkdir(parents=True)
        fill(temporary)
        for path in (*temporary.iterdir(), temporary):
            sync(path)
        if replaces := out.exists():  # the earlier export stays complete, under one name or another, until the new one
            out.rename(retired)
        temporary.rename(out)
        sync(out.parent)
        if replaces:
            shutil.rmtree(retired)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def with_pooling(saved: RunNetwork, global_pool: Pooling | None) -> PlainViT:
    """Return the network to export: a fine-tuned one unchanged, a pre-trained one with the requested pooling."""
    path, network = saved.folder.path, saved.metadata["network"]
    if saved.metadata["stage"] == "finetune":
        if global_pool not in (None, saved.vit.global_pool):
            raise ConfigError(
                f"{path} was fine-tuned with {saved.vit.global_pool} pooling: its classifier reads nothing else",
                "leave out --global-pool, or fine-tune with another student.global_pool",
            )
        return saved.vit
    if global_pool == "token" and saved.vit.cls_token is None:
        raise ConfigError(
            f"{path} has no class token to pool by", "use --global-pool avg, the mean of the patch tokens"
        )
    # For mean pooling, timm would use a new `fc_norm` after the mean; keep the encoder's trained norm instead.
    changed = {"num_classes": 0, "global_pool": global_pool or "avg", **pooled_norm(saved.vit, False)}
    if isinstance(saved.vit, VisionTransformer):
        changed["pool_include_prefix"] = False
    vit: TimmModel = timm.create_model(network["name"], pretrained=False, **network["arguments"] | changed)
    vit.load_state_dict(saved.vit.state_dict())
    return vit.eval()


def _fill(
    folder: Path,
    saved: RunNetwork,
    vit: TimmModel,
    weights: Weights,
    kinds: Sequence[str],
    inside: bool,
    int8: Int8Spec | None,
) -> None:
    """Write the files. export.json comes last, after the comparisons that it records. inside: the preprocessing."""
    metadata, view = saved.metadata, saved.metadata["input"]
    size = vit.patch_embed.img_size[0]
    assert size == view["size"], f"run.json: the network takes {size} px, its input is {view['size']}"
    record: dict[str, Any] = {
        "run": saved.folder.path.resolve().name,
        "stage": metadata["stage"],
        "checkpoint": saved.checkpoint.resolve().name,
        "exit": saved.exit,
        "peer": saved.peer,
        "weights": weights,
        "global_pool": vit.global_pool,
        "license": metadata["license"],
        "network": (saved.checkpoint / COMPLETE).read_text(),  # of which this may be an exit
        "formats": list(kinds),
    }
    if "timm" in kinds:
        _write_timm(folder, metadata, vit)
        record |= _compare(folder, saved, vit)
    if graphs := [kind for kind in kinds if kind in GRAPH_FILES]:
        stated = _preprocessing(metadata, vit, inside=inside)
        (folder / PREPROCESSING).write_text(stated.model_dump_json(indent=1) + "\n", encoding="utf-8")
        record |= {"with_preprocessing": inside, "graphs": write_graphs(graphs, vit, folder, stated)}
    if int8:
        record["int8"] = quantise(folder, int8)
    (folder / "README.md").write_text(model_card(saved, vit, weights=weights, record=record), encoding="utf-8")
    record["versions"] = {name: version(name) for name in ("torch", "timm", *(TO_WRITE if "onnx" in kinds else ()))}
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _write_timm(folder: Path, metadata: Mapping[str, Any], vit: TimmModel) -> None:
    """Write the weights, and timm's config with the architecture and the preprocessing."""
    view, size = metadata["input"], vit.patch_embed.img_size[0]
    data = {"input_size": (3, size, size), "mean": view["mean"], "std": view["std"], "crop_pct": view["crop"]}
    data |= {"interpolation": "bicubic", "crop_mode": "center"}
    model_config: dict[str, Any] = {"pretrained_cfg": {"license": metadata["license"]}}
    model_config["exif"] = view.get("exif", "ignore")  # which timm passes over, and `stated_exif` reads
    if classes := _classes(metadata, vit):
        model_config["label_names"] = classes
    vit.pretrained_cfg = {name: vit.pretrained_cfg.get(name) for name in _ARCHITECTURE}
    save_for_hf(vit, str(folder), model_config=model_config, data_config=data, safe_serialization=True)
    follow_umask(folder / "model.safetensors")


def _preprocessing(metadata: Mapping[str, Any], vit: TimmModel, *, inside: bool) -> Preprocessing:
    """Return what stands beside a graph: how images are made into its input. inside: the graph normalises them."""
    view = metadata["input"]
    return Preprocessing(
        size=view["size"],
        crop=view["crop"],
        interpolation="bicubic",
        mean=tuple(view["mean"]),
        std=tuple(view["std"]),
        input="uint8" if inside else "float32",
        gives="logits" if vit.num_classes else "features",
        exif=view.get("exif", "ignore"),
        classes=tuple(_classes(metadata, vit)),
        license=metadata["license"],
    )


def _classes(metadata: Mapping[str, Any], vit: TimmModel) -> list[str]:
    """Return the names of the classes, empty if they are not known."""
    classes = metadata.get("classes") or []
    return classes if len(classes) == vit.num_classes else []


@torch.no_grad()
def _compare(folder: Path, saved: RunNetwork, vit: PlainViT) -> dict[str, Any]:
    """Open the written folder with timm alone; tokens and outputs must equal the run's bit for bit.

    Raises DataError if they differ.
    """
    size = vit.patch_embed.img_size[0]
    images = torch.randn(_IMAGES, 3, size, size, generator=torch.Generator().manual_seed(0))  # [B, 3, s, s]
    reopened: TimmModel = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    expected, tokens = saved.vit.forward_features(images), reopened.forward_features(images)  # [B, P + N, D]
    pairs = [(expected, tokens), (vit.forward_head(expected), reopened.forward_head(tokens))]  # the heads': [B, D or C]
    difference = max(float((ours - theirs).abs().max()) for ours, theirs in pairs)
    if not difference == 0.0:  # `not ==` also catches nan
        raise DataError(
            f"timm {version('timm')} does not reproduce the outputs of {saved.checkpoint}: {difference:g} apart",
            "export with the timm that the run was made with, which its run.json names",
        )
    return {"max_difference": difference, "values": sum(ours.numel() for ours, _ in pairs)}
