"""Weights & Biases. Mode, project and login are its own settings: WANDB_MODE, WANDB_PROJECT, WANDB_API_KEY."""

from collections.abc import Mapping
from typing import Any

from maedistill.escaping import say
from maedistill.runs.folder import RunFolder
from maedistill.runs.trackers.tracker import End, Opening


class WandbRun:
    """A run of W&B, whose files are in RUN/wandb. It does not say what it has; metrics.jsonl does."""

    def __init__(self, opening: Opening) -> None:
        import wandb

        wandb.setup(wandb.Settings(silent=True))  # nor may it ask for a login while the run trains
        settings = wandb.Settings(console="off", disable_git=True, x_disable_meta=True, x_save_requirements=False)
        settings.init_timeout = settings.finish_timeout = 30  # also at the end of a Python caller's process
        self._image = wandb.Image
        self._run = wandb.init(
            dir=opening.folder,
            id=opening.id,
            resume="allow",
            reinit="create_new",  # a Python caller may have a run of its own
            name=RunFolder(opening.folder).title,
            config=opening.settings,
            allow_val_change=True,  # log.every_steps and the like may differ when a run is continued
            settings=settings,
        )
        self.id: str = self._run.id
        self.last = dict(opening.written) if opening.id else {}
        say(f"wandb    run {self.id} at {self._run.url or opening.folder / 'wandb'}")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers by tag."""
        self._run.log(dict(values), step=step)

    def picture(self, step: int, name: str, pixels: Any) -> None:
        """Log an image, uint8 [H, W, 3]."""
        self._run.log({name: self._image(pixels)}, step=step)

    def close(self, end: End) -> None:
        """Wait until all is sent, or written in offline mode."""
        self._run.finish(exit_code=0 if end == "finished" else 1)
