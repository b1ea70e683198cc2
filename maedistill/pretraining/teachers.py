"""The teachers of a pre-training run: one in most runs, the student's average, or several.

Each further teacher adds an alignment term, with a head and a view of its own. It is described as the first is, by the
settings of its text: "teacher.source=... align.weight=2". It sees the patches that the first one sees, and is compared
at those that the student sees.
"""

from dataclasses import dataclass
from typing import Any

import torch

from maedistill.config.keys import flat
from maedistill.config.loader import COMMAND_LINE, cut_settings, load_config
from maedistill.config.pretrain import PretrainConfig
from maedistill.config.sources import EMA, PYTHON_KIND
from maedistill.errors import ConfigError
from maedistill.methods.average import AverageTeacher
from maedistill.methods.dmae import AlignmentSpec
from maedistill.methods.statistics import ChannelStatistics
from maedistill.methods.teacher import Teacher
from maedistill.models.encoder import Encoder
from maedistill.pretraining.build import alignment_spec, build_average, build_teacher, build_teacher_source
from maedistill.runs.objects import NOTHING, Objects
from maedistill.weights.network import Network
from maedistill.weights.state_dict import weights_fingerprint


@dataclass(eq=False)
class RunTeacher:
    """A teacher of the run. network, fingerprint: of its weights; None for the student's average.

    config: the run's; for a further teacher that of a DMAE run whose only teacher is this one.
    statistics: of its channels, with align.normalize=stored.
    """

    config: PretrainConfig
    network: Network | None
    spec: AlignmentSpec
    fingerprint: str | None
    teacher: Teacher

    def __post_init__(self) -> None:
        """Set up the statistics."""
        align, shape = self.config.align, {"width": self.teacher.width, "prefix": self.teacher.num_prefix}
        self.statistics: ChannelStatistics | None = None
        if align.normalize == "stored":
            statistics = ChannelStatistics(align.teacher, steps=align.stored_steps, **shape)
            self.statistics = statistics.to(self.teacher.mean.device)

    def describe(self) -> str:
        """Return one line for the log: where the weights come from."""
        if isinstance(self.teacher, AverageTeacher):
            return "ema  the student's own moving average, decay {:g} to {:g}".format(*self.teacher.decay)
        assert self.network is not None
        return self.network.describe()


def open_teachers(
    config: PretrainConfig, encoder: Encoder, device: torch.device, objects: Objects = NOTHING
) -> list[RunTeacher]:
    """Open the teachers of a student's `encoder` on `device`, except for the average, a copy of the finished student.

    Raises ConfigError for one that does not fit the student, DataError for weights that cannot be loaded.
    """
    opened = [_open(config, encoder, device, objects)] if config.teacher.source not in (None, EMA) else []
    for number, text in enumerate(config.more_teachers, 2):
        try:
            opened.append(_open(_config_of(text, config), encoder, device, name=f"align/teacher{number}"))
        except ConfigError as error:
            raise ConfigError(f"more_teachers: {text!r}: {error.cause}", error.remedy) from error
    return opened


def open_average(config: PretrainConfig, student: Encoder, device: torch.device, *, steps: int) -> RunTeacher:
    """Build the average of `student` on `device`, as the first teacher. steps: of the run."""
    average = build_average(config, student, device, steps=steps)
    return RunTeacher(config, None, alignment_spec(config, student, student), None, average)


def _open(
    config: PretrainConfig, encoder: Encoder, device: torch.device, objects: Objects = NOTHING, *, name: str = "align"
) -> RunTeacher:
    """Open a teacher whose config this is. name: of its terms."""
    network = build_teacher_source(config, grid=encoder.grid, objects=objects)
    assert network is not None
    spec = alignment_spec(config, encoder, network.encoder, name=name)
    fingerprint = weights_fingerprint(network.encoder)  # before its dtype changes
    return RunTeacher(config, network, spec, fingerprint, build_teacher(config, network, device))


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
            raise ConfigError(f"it sets {name}", "an entry sets only teacher.* and align.*, not warmup_share")
    return entry.config
