"""The teachers of a pre-training run beside its first: each adds an alignment term, with a head and a view of its own.

A further teacher is described as the first is, by the settings of its text: "teacher.source=... align.weight=2". It
sees the patches that the first one sees, and is compared at those that the student sees.
"""

from dataclasses import dataclass
from typing import Any

import torch

from maedistill.config.keys import flat
from maedistill.config.loader import COMMAND_LINE, cut_settings, load_config
from maedistill.config.pretrain import PretrainConfig
from maedistill.config.sources import EMA, PYTHON_KIND
from maedistill.errors import ConfigError
from maedistill.methods.dmae import AlignmentSpec
from maedistill.methods.teacher import Teacher
from maedistill.models.encoder import Encoder
from maedistill.pretraining.build import alignment_spec, build_teacher, build_teacher_source
from maedistill.weights.network import Network
from maedistill.weights.state_dict import weights_fingerprint


@dataclass(frozen=True)
class MoreTeacher:
    """A teacher beside the first. config: the run's, with this one in the first one's place, and method=dmae."""

    config: PretrainConfig
    source: Network
    spec: AlignmentSpec
    fingerprint: str
    teacher: Teacher


def open_more_teachers(config: PretrainConfig, encoder: Encoder, device: torch.device) -> list[MoreTeacher]:
    """Open the further teachers of a student's `encoder`, on `device`.

    Raises ConfigError for one that does not fit the student, DataError for weights that cannot be loaded.
    """
    opened = []
    for number, text in enumerate(config.more_teachers, 2):
        try:
            entry = _config_of(text, config)
            source = build_teacher_source(entry, grid=encoder.grid)
            assert source is not None
            spec = alignment_spec(entry, encoder, source.encoder, name=f"align/teacher{number}")
            fingerprint = weights_fingerprint(source.encoder)  # before its dtype changes
            opened.append(MoreTeacher(entry, source, spec, fingerprint, build_teacher(entry, source, device)))
        except ConfigError as error:
            raise ConfigError(f"more_teachers: {text!r}: {error.cause}", error.remedy) from error
    return opened


def _config_of(text: str, config: PretrainConfig) -> PretrainConfig:
    """Return the config of a further teacher. Raises ConfigError for settings that teachers must share."""
    settings = cut_settings(text)
    if f"teacher.source={EMA}" in settings or f"teacher.source={PYTHON_KIND}:" in text:
        raise ConfigError("an average, or an object, can only be the first teacher", "name others here")
    changed: dict[str, Any] = {"method": "dmae", "masks.teacher_keep_ratio": None, "more_teachers": []}
    all_values, own = flat(config) | changed, ("teacher.", "generate.")
    shared = {name: value for name, value in all_values.items() if not name.startswith(own)}
    shared["teacher.precision"] = config.teacher.precision
    entry = load_config(shared, settings, root=PretrainConfig, to_run=False)
    for name, origin in entry.origins.items():
        is_own = name.startswith(("teacher.", "align.")) and name != "align.warmup_share"
        if not is_own and origin == COMMAND_LINE:
            raise ConfigError(f"it sets {name}", "teachers differ in teacher.* and align.* alone, but for warmup_share")
    return entry.config
