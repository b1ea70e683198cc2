"""The Python API: each function does what the command of its name does, and takes objects that no config can describe.

    import maedistill

    maedistill.make_shards("photos", "shards/photos", val_fraction=0.1)
    run = maedistill.pretrain("imagenet/dmae_vit_s", {"data.train": "shards/photos/train-*.tar", "run": "runs/student"})
    backbone = maedistill.load_backbone(run)  # a timm model: images [B, 3, s, s] -> features [B, D]

All functions raise `UserError` for what a user can fix, with `cause` and `remedy`. With several processes (torchrun)
every process calls the same function with the same arguments.
"""

import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from maedistill.config.finetune import FinetuneConfig
from maedistill.config.loader import load_config
from maedistill.config.pretrain import PretrainConfig
from maedistill.config.schema import SHAPE, Precision
from maedistill.data.loading.dataset import ImageDataset
from maedistill.data.shards import write
from maedistill.data.shards.scan import Members
from maedistill.data.shards.sources import open_source
from maedistill.data.shards.write import ConversionStats
from maedistill.errors import ConfigError, DataError
from maedistill.evaluation.context import open_context
from maedistill.evaluation.scorecard import ScoreSpec, score
from maedistill.exporting.folder import Pooling, with_pooling
from maedistill.exporting.folder import export as export_run
from maedistill.finetuning import loop as finetuning
from maedistill.methods.mae import MAE
from maedistill.pretraining import loop as pretraining
from maedistill.processes.preemption import SIGNALS
from maedistill.runs.callback import Callback
from maedistill.runs.folder import RunFolder
from maedistill.runs.history import read_metrics as read_metrics_of
from maedistill.runs.objects import Objects, python_name
from maedistill.runs.resolve_auto import with_warmup_of_run
from maedistill.weights.from_run import Weights, load_into, open_run

Config = str | Path | Mapping[str, Any]
Overrides = Sequence[str] | Mapping[str, Any]


def make_shards(
    source: str | Path,
    out: str | Path,
    *,
    val_fraction: float = 0.0,
    root: str | None = None,
    images_per_shard: int = write.IMAGES_PER_SHARD,
    shorter_side: int | None = None,
    quality: int = write.QUALITY,
    workers: int = 1,
) -> dict[str, ConversionStats]:
    """Write a folder of images, or `imagenet`, `cifar10` or `digits`, as WebDataset shards with an index.

    val_fraction: share to hold out of a folder without splits. root: where the files of imagenet or cifar10 are.
    shorter_side: shrink larger images to this many pixels, as JPEGs of `quality`. workers: threads that decode.
    Returns what was written, converted and skipped, by split. The same call continues one that was interrupted.
    """
    return write.make_shards(
        open_source(os.path.expanduser(source), root=root, val_fraction=val_fraction),
        Path(os.path.expanduser(out)),
        images_per_shard=images_per_shard,
        shorter_side=shorter_side,
        quality=quality,
        workers=workers,
    )


def pretrain(
    config: Config | PretrainConfig,
    overrides: Overrides = (),
    *,
    student: nn.Module | None = None,
    teacher: nn.Module | None = None,
    dataset: ImageDataset | None = None,
    val_dataset: ImageDataset | None = None,
    method: Callable[..., MAE] | None = None,
    callbacks: Sequence[Callback] = (),
    extend: bool = False,
) -> Path:
    """Pre-train a student, or continue the run in its folder, and return that folder.

    config: a file, the name of a config of maedistill, a mapping of settings, or a PretrainConfig. overrides: settings
    on top of it, as `{"optim.epochs": 100}` or `["optim.epochs=100"]`.
    student, teacher: in place of the config's; a plain ViT of timm, or any module that is an `Encoder`; a teacher also
    any network of timm that gives feature maps. The student starts from its current weights. method: a subclass
    of the class that the config's `method` names, or a function that returns one; it is called with the arguments of
    that class. dataset, val_dataset: in place of shards.
    callbacks: hooks of the run. extend: continue with more epochs than before.
    """
    objects = Objects(student, (teacher,) if teacher is not None else (), dataset, val_dataset, method)
    given = _names_of_data(objects)
    if student is not None:
        given |= {"student.model": python_name(student)} | dict.fromkeys(_SHAPE)
    if teacher is not None:
        given |= {"teacher.source": python_name(teacher)} | dict.fromkeys(f"teacher.{name}" for name in _OF_A_FILE)
    unused = (*_unused_of_data(objects), *(["student.drop_path"] if student is not None else []))
    loaded = load_config(config, overrides, root=PretrainConfig, given=given, unused=unused)
    settings = (with_warmup_of_run(loaded) if extend else loaded).config
    with _process_restored():
        pretraining.pretrain(settings, objects=objects, callbacks=callbacks, extend=extend)
    return RunFolder(settings.run).path


def finetune(
    config: Config | FinetuneConfig,
    overrides: Overrides = (),
    *,
    student: nn.Module | None = None,
    teacher: nn.Module | Sequence[nn.Module] | None = None,
    dataset: ImageDataset | None = None,
    val_dataset: ImageDataset | None = None,
    callbacks: Sequence[Callback] = (),
    extend: bool = False,
) -> Path:
    """Fine-tune a network on labels, or continue the run in its folder, evaluate it, and return that folder.

    student: any module that maps normalised images [B, 3, s, s] to logits [B, C], in place of init.source; the config's
    `student` section is then not used. teacher: one such module or several, in place of distill.teachers; the config
    gives weights to the terms. A model of timm brings its own normalisation. The other arguments are those of
    `pretrain`.
    """
    teachers = (teacher,) if isinstance(teacher, nn.Module) else tuple(teacher or ())
    objects = Objects(student, teachers, dataset, val_dataset)
    given = _names_of_data(objects)
    if student is not None:
        given |= {"init.source": python_name(student), "student.model": None} | dict.fromkeys(_SHAPE)
    if teachers:
        given["distill.teachers"] = [f"{python_name(one)}{f'#{i}' if i else ''}" for i, one in enumerate(teachers)]
    of_vit = ["student.drop_path", "student.global_pool"] if student is not None else []
    unused = (*_unused_of_data(objects), *of_vit)
    loaded = load_config(config, overrides, root=FinetuneConfig, given=given, unused=unused)
    settings = (with_warmup_of_run(loaded) if extend else loaded).config
    with _process_restored():
        finetuning.finetune(settings, objects=objects, callbacks=callbacks, extend=extend)
    return RunFolder(settings.run).path


def evaluate(
    model: str | Path | nn.Module,
    data: str | Path | ImageDataset,
    *,
    weights: str = "model",
    exit: int | None = None,
    peer: int = 0,
    image_size: int | None = None,
    crop: float | None = None,
    image_key: str | None = None,
    label_key: str | None = None,
    against: str | None = None,
    batch: int = 64,
    workers: int | None = None,
    precision: Precision = "auto",
) -> dict[str, Any]:
    """Evaluate a classifier on every image once, print its scorecard and return it.

    model: a run folder, an export folder, KIND:NAME (as `timm:resnet18.a1_in1k`), or a module that maps normalised
    images [B, 3, s, s] to logits. data: labelled shards or a data set. weights: `ema` for a moving average, or the name
    of an entry of a checkpoint file. exit: the block of one of a run's exits, where the network ends. peer: a student
    of mutual learning, counted from 1. image_size, crop: if not the model's own. image_key, label_key: which members of
    a sample are image and label, as the keys of `data`. against: a second classifier, for agreement and a paired
    comparison.
    """
    source = model if isinstance(model, nn.Module) else str(model)
    images = str(data) if isinstance(data, str | Path) else data
    spec = ScoreSpec(
        source,
        images,
        weights=weights,
        exit=exit,
        peer=peer,
        image_size=image_size,
        crop=crop,
        members=Members(image_key, label_key),
        against=against,
    )
    with _process_restored():
        context = open_context(batch=batch, workers=workers, threads=None, precision=precision)
        return score(spec, context, files={})


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
) -> Path:
    """Write the network of a run as a folder that timm opens, with its model card, and return that folder.

    out: by default RUN/export, with `exit` RUN/export_exitBLOCK, with `peer` RUN/export_peerN. weights: `ema` for the
    moving average. global_pool: how a pre-trained backbone pools its patches: `avg` (the default) or `token`. exit: the
    block of one of its exits, where the network ends. peer: a student of mutual learning, from 1. formats: `timm`,
    `onnx`, `torch_export`, the last two as graphs that run without timm. with_preprocessing: the graphs take uint8
    images, and scale and normalise them.
    """
    part: dict[str, Any] = {"weights": weights, "exit": exit, "peer": peer}
    return export_run(run, out, **part, global_pool=global_pool, formats=formats, with_preprocessing=with_preprocessing)


def load_backbone(
    run: str | Path,
    *,
    weights: Weights = "model",
    global_pool: Pooling | None = None,
    exit: int | None = None,
    peer: int = 0,
    student: nn.Module | None = None,
) -> Any:
    """Return the network of a run as a timm model in eval mode, without classifier: [B, 3, s, s] -> features [B, D].

    weights, global_pool, exit, peer: as in `export`. student: for a run with a student of your own, a module of its
    class; its weights are set to those of the run, and it is returned, as it is.
    """
    if student is not None:
        if global_pool is not None or exit is not None or peer:
            cause = "global_pool, exit and peer change a ViT of timm, and student= is a module of your own"
            raise ConfigError(cause, "leave them out")
        return load_into(student, run, weights=weights)
    saved = open_run(run, weights=weights, exit=exit, peer=peer)
    backbone = with_pooling(saved, global_pool)
    backbone.reset_classifier(0)
    return backbone


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """Return what a run has recorded, one object per logged step or evaluation: the lines of metrics.jsonl."""
    folder = RunFolder(run).path
    if not (folder / "run.json").is_file():
        raise DataError(f"{folder} holds no run", "name the folder that maedistill.pretrain or finetune returned")
    return read_metrics_of(folder)


_SHAPE = tuple(f"student.{name}" for name in SHAPE)
_OF_A_FILE = ("model", "weights", "width", "depth", "num_heads", "patch_size", "pos_embed", "sha256")


@contextmanager
def _process_restored() -> Iterator[None]:
    """Restore, after the block, what a run changes in its process: signal handlers, threads, torch's choice of kernels.

    A command leaves them until it exits, since a launcher may still send signals.
    """
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    choice: Any = torch.utils.deterministic
    kernels, fill = torch.get_deterministic_debug_mode(), choice.fill_uninitialized_memory
    threads, flash = torch.get_num_threads(), torch.backends.cuda.flash_sdp_enabled()
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None and signal.getsignal(number) != handler:
                signal.signal(number, handler)
        torch.set_deterministic_debug_mode(kernels)
        choice.fill_uninitialized_memory = fill
        torch.set_num_threads(threads)
        torch.backends.cuda.enable_flash_sdp(flash)


def _names_of_data(objects: Objects) -> dict[str, Any]:
    """Return the settings that name the caller's data sets."""
    sets = {"data.train": objects.dataset, "data.val": objects.val_dataset}
    return {key: python_name(dataset) for key, dataset in sets.items() if dataset is not None}


def _unused_of_data(objects: Objects) -> list[str]:
    """Return the keys of data that are of shards alone, where the caller's data sets are in their place."""
    keys = ["data.index", "data.shuffle_window"] if objects.dataset is not None else []
    both = objects.dataset is not None and objects.val_dataset is not None
    return [*keys, *(["data.image_key", "data.label_key", "data.exif"] if both else [])]
