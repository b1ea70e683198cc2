"""TensorBoard: the event files of a run, with its settings as text and hyper-parameters."""

from collections.abc import Mapping
from typing import Any

from maedistill.runs.trackers.tracker import End, Opening

_RESULTS = ("val/top1", "val/ema_top1", "val/knn", "val/linear", "train/loss")  # the columns beside hyper-parameters


class Board:
    """Event files in RUN/tb. A start that repeats steps hides those that the one before wrote."""

    id = None

    def __init__(self, opening: Opening) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        folder, first_step = opening.folder / "tb", opening.first_step
        known = opening.written if folder.is_dir() else {}
        self.last = {tag: min(step, first_step) for tag, step in known.items()}
        self._writer = SummaryWriter(folder, purge_step=first_step + 1)
        if settings := opening.settings:
            lines = (opening.folder / "config.yaml").read_text().splitlines()
            self._writer.add_text("config", "".join(f"    {line}\n" for line in lines), first_step)
            # SummaryWriter.add_hparams would open a second run
            for summary in hparams(settings, dict.fromkeys(_RESULTS)):
                self._writer._get_file_writer().add_summary(summary)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write numbers by tag."""
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def picture(self, step: int, name: str, pixels: Any) -> None:
        """Write an image, uint8 [H, W, 3]."""
        self._writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self, _: End) -> None:
        """Flush the files."""
        self._writer.close()
