"""Replace `auto` in a config by numbers, once the training images are counted and before anything depends on them.

The numbers go into RUN/config.yaml. A run that continues keeps them, whatever the number of ranks is by then.
"""

from typing import Any

from maedistill.config.auto import Config, auto_keys, auto_line, with_numbers, with_values
from maedistill.config.keys import flat
from maedistill.config.loader import require_consistent
from maedistill.processes import distributed
from maedistill.runs.checkpoint import checkpoint_steps
from maedistill.runs.folder import RunFolder
from maedistill.runs.previous import read_previous


def settle(config: Config, images: int, *, world_size: int) -> tuple[Config, list[str]]:
    """Return the config with numbers for `auto`, and the line of the summary that says which. Collective.

    images: that are trained on. Raises ConfigError if the numbers break a rule between keys.
    """
    if not (keys := auto_keys(config)):
        return config, []
    kept: dict[str, Any] = distributed.on_main(lambda: _numbers_of_run(config, keys))
    settled = with_values(config, kept) if kept else with_numbers(config, images, world_size=world_size)
    require_consistent(settled)
    return settled, [auto_line(config, settled, images, of_the_run=bool(kept))]


def _numbers_of_run(config: Config, keys: list[str]) -> dict[str, Any]:
    """Return the values of these keys in the run that the config's folder holds; empty before its first checkpoint."""
    folder = RunFolder(config.run)
    if not checkpoint_steps(folder.checkpoints) or (before := read_previous(folder.path, config).config) is None:
        return {}
    values = flat(before)
    return {key: values[key] for key in keys}
