"""A run's network as a folder that timm opens anywhere, without this package: weights, timm config and model card.

    RUN/run.json + newest intact checkpoint -> timm network -> OUT.tmp/ -> opened by timm and compared -> OUT/

OUT holds model.safetensors, config.json (timm's), README.md (see card.py) and export.json, which says what was exported
and how it was verified. Only the encoder goes out, and of a fine-tuned run its classifier: no decoder, projection or
generator. Nothing appears under the name OUT that `timm.create_model("local-dir:OUT", pretrained=True)` does not turn
into the outputs of the checkpoint, to the last bit.

    B batch   P prefix tokens   N patches   D width   C outputs   s image side
"""

import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from safetensors import SafetensorError
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer

from maedistill.errors import ConfigError, DataError
from maedistill.export.card import model_card
from maedistill.runs.folder import RunFolder
from maedistill.weights.from_run import RunNetwork, Weights, open_saved

Pooling = Literal["avg", "token"]
RECORD = "export.json"
FILES = {"config.json", "model.safetensors", "README.md", RECORD}
# What timm's config for the architecture may hand on. The rest (tag, licence, paper, labels) tells of the weights that
# timm publishes under this name, and would be false of these.
_ARCHITECTURE = ("architecture", "input_size", "fixed_input_size", "pool_size", "first_conv", "classifier")
_IMAGES = 2  # of random pixels, by which the written folder is compared with the run


def export(
    run: str | Path, out: str | Path | None = None, *, weights: Weights = "model", pooling: Pooling | None = None
) -> Path:
    """Writes the network of a run folder to `out`, by default RUN/export, and returns that folder.

    weights: `ema` for the moving average. pooling: what the output of a pre-trained student is, [B, D], after its own
    norm: `avg`, the mean of the patch tokens (the default), or `token`, the class token. A fine-tuned network goes out
    as it is, with its classifier: [B, C]. An earlier export in `out` is replaced.
    Raises ConfigError for an `out` that holds anything else and for a pooling that the network cannot have, DataError
    for a folder that is no run, has no such weights, or cannot be written.
    """
    folder = RunFolder(run)
    # As it is meant: `new/..` does not exist, and so looked free, but would be created in place of this folder.
    out = Path(os.path.normpath(os.path.expanduser(out))) if out is not None else folder.path / "export"
    try:
        _require_free(out)
        saved = open_saved(folder.path, weights=weights)
        _replace(out.resolve(), saved, _with_pooling(saved, pooling), weights)
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"the export cannot be written to {out}: {error}", "make room or mend the permissions, or use another --out"
        ) from error
    return out


def read_record(out: Path) -> dict[str, Any]:
    """export.json: run, stage, checkpoint, weights, pooling, licence, max_difference, values (compared), versions."""
    return json.loads((out / RECORD).read_text(encoding="utf-8"))


def _require_free(out: Path) -> None:
    """Only an empty folder or an earlier export may be replaced, and only one to which nobody has added a file."""
    if not out.exists():
        return
    if out.resolve() == Path.cwd():
        raise ConfigError(f"{out} is the working directory, which cannot be replaced", "use another --out")
    names = {path.name for path in out.iterdir()} if out.is_dir() else {out.name}
    if names and not (RECORD in names and names <= FILES):
        others = sorted(names - FILES) or sorted(names)
        raise ConfigError(
            f"{out} holds something else than an export of ours ({', '.join(others[:3])})", "use another --out"
        )


def _replace(out: Path, saved: RunNetwork, vit: VisionTransformer, weights: Weights) -> None:
    """Fills a temporary folder beside `out` and gives it that name. Nothing else beside it is touched."""
    temporary, retired = (out.with_name(f"{out.name}{suffix}") for suffix in (".tmp", ".old.tmp"))
    for leftover in (temporary, retired):
        _remove_leftover(leftover)
    try:
        temporary.mkdir(parents=True)
        _fill(temporary, saved, vit, weights)
        _commit(temporary, out, retired)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_leftover(folder: Path) -> None:
    """Removes what a kill left under a temporary name. Raises OSError for what is somebody else's."""
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir() or not {path.name for path in folder.iterdir()} <= FILES:
        raise FileExistsError(f"{folder} is in the way, and is not what an export leaves")
    shutil.rmtree(folder)


def _with_pooling(saved: RunNetwork, pooling: Pooling | None) -> VisionTransformer:
    """The network as it goes out: a fine-tuned one as it is, a pre-trained one with the pooling asked for."""
    path, network = saved.folder.path, saved.facts["network"]
    if saved.facts["stage"] == "finetune":
        if pooling not in (None, saved.vit.global_pool):
            raise ConfigError(
                f"{path} was fine-tuned with {saved.vit.global_pool} pooling: its classifier reads nothing else",
                "leave out --pool, or fine-tune with another student.pooling",
            )
        return saved.vit
    if pooling == "token" and not saved.vit.has_class_token:
        raise ConfigError(f"{path} has no class token to pool by", "use --pool avg, the mean of the patch tokens")
    # timm would move the norm behind the mean, to a new `fc_norm`: the encoder's own has been trained, and stays.
    changed = {"num_classes": 0, "global_pool": pooling or "avg", "fc_norm": False, "pool_include_prefix": False}
    vit = timm.create_model(network["name"], pretrained=False, **network["arguments"] | changed)
    vit.load_state_dict(saved.vit.state_dict())
    return vit.eval()


def _fill(folder: Path, saved: RunNetwork, vit: VisionTransformer, weights: Weights) -> None:
    """Writes the four files; export.json comes last, after the comparison that it records."""
    facts, seen = saved.facts, saved.facts["input"]
    size = vit.patch_embed.img_size[0]
    assert size == seen["size"], f"run.json: the network takes {size} px, its input is {seen['size']}"
    data = {"input_size": (3, size, size), "mean": seen["mean"], "std": seen["std"], "crop_pct": seen["crop"]}
    data |= {"interpolation": "bicubic", "crop_mode": "center"}
    model_config: dict[str, Any] = {"pretrained_cfg": {"license": facts["licence"]}}
    classes = facts.get("classes")
    if classes is not None and len(classes) == vit.num_classes:
        model_config["label_names"] = classes
    vit.pretrained_cfg = {name: vit.pretrained_cfg.get(name) for name in _ARCHITECTURE}
    save_for_hf(vit, str(folder), model_config=model_config, data_config=data, safe_serialization=True)
    (folder / "README.md").write_text(model_card(saved, vit, weights=weights), encoding="utf-8")
    record = {"run": saved.folder.path.resolve().name, "stage": facts["stage"], "checkpoint": saved.checkpoint.name}
    record |= {"weights": weights, "pooling": vit.global_pool, "licence": facts["licence"]}
    record |= _compare(folder, saved, vit)
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def _compare(folder: Path, saved: RunNetwork, vit: VisionTransformer) -> dict[str, Any]:
    """Opens the written folder as a stranger would; tokens and outputs must be the run's, to the last bit."""
    size = vit.patch_embed.img_size[0]
    images = torch.randn(_IMAGES, 3, size, size, generator=torch.Generator().manual_seed(0))  # [B, 3, s, s]
    reopened = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    tokens, found = saved.vit.forward_features(images), reopened.forward_features(images)  # [B, P + N, D]
    pairs = [(tokens, found), (vit.forward_head(tokens), reopened.forward_head(found))]  # [B, P + N, D], [B, D or C]
    difference = max(float((wanted - got).abs().max()) for wanted, got in pairs)
    if not difference == 0.0:  # nan differs, too
        raise DataError(
            f"timm {version('timm')} does not give the outputs of {saved.checkpoint} back: {difference:g} apart",
            "export with the timm that the run was made with, which its run.json names",
        )
    versions = {name: version(name) for name in ("torch", "timm")}
    return {"max_difference": difference, "values": sum(got.numel() for _, got in pairs), "versions": versions}


def _commit(temporary: Path, out: Path, retired: Path) -> None:
    """The new folder takes the name; an earlier export is whole under one name or another at any instant."""
    if not out.exists():
        temporary.rename(out)
        return
    out.rename(retired)
    temporary.rename(out)
    shutil.rmtree(retired)
