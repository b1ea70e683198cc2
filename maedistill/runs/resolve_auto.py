"""Replace `auto` in a config by values, before anything depends on it.

The values go into RUN/config.yaml. A run that continues keeps them, whatever ranks and devices there are by then.
"""

from dataclasses import replace
from typing import Any

import torch

from maedistill.config.auto import FORMAT, Config, auto_keys, auto_line, with_numbers, with_values
from maedistill.config.keys import flat
from maedistill.config.loader import COMMAND_LINE, PYTHON, LoadedConfig, require_consistent
from maedistill.config.schema import AUTO
from maedistill.errors import ConfigError
from maedistill.escaping import warn
from maedistill.machine import emulates_bf16, resolve_precision
from maedistill.processes import distributed
from maedistill.runs.checkpoint import checkpoint_steps
from maedistill.runs.folder import RunFolder
from maedistill.runs.previous import read_previous

_WARMUP = "optim.warmup_epochs"


def resolve_auto(config: Config, images: int, *, world_size: int, fresh: bool) -> tuple[Config, list[str]]:
    """Return the config with numbers for `auto`, and the line of the summary that says which. Collective.

    images: that are trained on; fresh: the run in the folder is about to be deleted. Raises ConfigError if the numbers
    break a rule between keys.
    """
    if not (keys := auto_keys(config)):
        return config, []
    kept: dict[str, Any] = {} if fresh else distributed.on_main(lambda: _values_of_run(config, keys))
    resolved = with_values(config, kept) if kept else with_numbers(config, images, world_size=world_size)
    require_consistent(resolved)
    return resolved, [auto_line(config, resolved, images, of_the_run=bool(kept))]


def with_precision(config: Config, device: torch.device, *, fresh: bool) -> Config:
    """Return the config with a number format in place of `engine.precision=auto`. Collective.

    fresh: the run in the folder is about to be deleted. Warns of bf16 on a CPU that emulates it. Raises ConfigError if
    the GPUs of the ranks differ in the format, since fp16 scales the loss and the other formats do not, or if a run in
    fp16 would continue without a GPU.
    """
    if device.type == "cpu" and distributed.is_main() and emulates_bf16():
        for key, value in flat(config).items():
            if key.endswith("precision") and value == "bf16":
                warn(f"{key}=bf16: this CPU has no bf16 instructions and takes several times as long; set it to fp32")
    if config.engine.precision != AUTO:
        return config
    kept = {} if fresh else distributed.on_main(lambda: _values_of_run(config, [FORMAT]))
    began = kept.get(FORMAT, AUTO)
    if began == "fp16" and device.type != "cuda":
        raise ConfigError(
            f"{FORMAT}=auto: this run began in fp16, which needs a GPU", "continue it on one, or use another run="
        )
    formats = set(distributed.gather_objects(resolve_precision(began, device)))
    if len(formats) > 1:
        cause = f"{FORMAT}=auto: the GPUs of the ranks differ, it would be {' and '.join(sorted(formats))}"
        raise ConfigError(cause, f"set {FORMAT}=fp16 or fp32, or start the ranks on GPUs of one kind")
    return with_values(config, {FORMAT: formats.pop()})


def with_warmup_of_run(loaded: LoadedConfig[Config]) -> LoadedConfig[Config]:
    """Return the settings of a run that gets more epochs, with the warm-up that it began with unless they set another.

    The loader shortens a file's warm-up in proportion to fewer epochs, and would do so in another proportion now.
    """
    if loaded.origins[_WARMUP] in (COMMAND_LINE, PYTHON):
        return loaded
    kept = _values_of_run(loaded.config, [_WARMUP])
    return replace(loaded, config=with_values(loaded.config, kept), notes=()) if kept else loaded


def _values_of_run(config: Config, keys: list[str]) -> dict[str, Any]:
    """Return the values of these keys in the run that the config's folder holds; empty before its first checkpoint."""
    folder = RunFolder(config.run)
    if not checkpoint_steps(folder.checkpoints) or (before := read_previous(folder.path, config).config) is None:
        return {}
    values = flat(before)
    return {key: values[key] for key in keys}
