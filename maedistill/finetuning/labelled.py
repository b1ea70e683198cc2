"""The labelled data of a fine-tuning: its indexes, and how many classes they have."""

import numpy as np

from maedistill.config.finetune import FinetuneConfig
from maedistill.data.shards.index import ShardIndex
from maedistill.errors import ConfigError, DataError
from maedistill.runs.objects import Objects, open_samples

_SPARSE = 10  # labels are suspect if fewer than 1 in 10 of the ids up to the largest one occur


def open_labelled(config: FinetuneConfig, objects: Objects) -> tuple[ShardIndex, ShardIndex]:
    """Open the indexes of training and validation data; check for equal classes and the labels that are needed."""
    index, val_index = open_samples(config.data, objects)
    assert val_index is not None  # a rule of the config requires it
    for part in (index, val_index) if config.distill.reads_labels else (val_index,):
        part.require_labels()
    if index.classes and val_index.classes and index.classes != val_index.classes:
        raise DataError(
            f"training and validation shards name other classes ({len(index.classes)} and {len(val_index.classes)})",
            "name shards of one data set in data.train and data.val",
        )
    return index, val_index


def count_classes(config: FinetuneConfig, index: ShardIndex, val_index: ShardIndex) -> int:
    """Return the number of outputs of the head. Raises ConfigError or DataError if a label would have none."""
    if not config.distill.reads_labels and not index.classes:
        index = val_index  # training shards may have no labels
    most = int(max(np.max(index.labels), np.max(val_index.labels))) + 1
    given = config.data.num_classes
    if given is not None and given < most:
        raise ConfigError(
            f"data.num_classes: {given} outputs for labels up to {most - 1}", f"use {most} or more, or null"
        )
    if given is None and not index.classes:
        _require_dense(index)
    if given is None and int(np.max(val_index.labels)) >= index.num_classes:
        raise DataError(
            f"validation labels go up to {most - 1}, training shards have {index.num_classes} classes",
            "name shards of one data set in data.train and data.val, or set data.num_classes",
        )
    return given or max(2, index.num_classes)


def _require_dense(index: ShardIndex) -> None:
    """Raise DataError if so few classes up to the largest label occur that this label is probably a mistake."""
    found, largest = len(np.unique(index.labels)), int(np.max(index.labels))
    if largest + 1 > _SPARSE * found:
        first = index.sample_name(int(np.argmax(index.labels)))
        raise DataError(
            f"labels go up to {largest:,}, first {first}, but only {found} of these classes occur",
            f"correct the label, or set data.num_classes={largest + 1} if it is right",
        )
