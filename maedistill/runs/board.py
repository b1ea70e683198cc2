"""TensorBoard: the event files of a run, with its settings as text and hyper-parameters, and the tags of metrics."""

from pathlib import Path
from typing import Any

from maedistill.config.document import read_file
from maedistill.escaping import say

_OF_THE_MACHINE = {"images_per_second", "data_wait", "memory_gb", "eta_seconds", "trained_seconds"}
_RESULTS = ("val/top1", "val/ema_top1", "val/knn", "val/linear", "train/loss")  # the columns beside hyper-parameters


def board_tag(name: str, *, is_training: bool) -> str:
    """Return the TensorBoard tag of a metric: sys/ for the machine, train/ for training, val/ for evaluations."""
    return f"{'sys' if name in _OF_THE_MACHINE else 'train' if is_training else 'val'}/{name}"


def open_board(folder: Path, first_step: int) -> Any:
    """Open the event files of the run in `folder`, which resumes at `first_step`. None if tensorboard is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams
    except ImportError:
        say("no TensorBoard events: tensorboard is not installed (pip install tensorboard)")
        return None
    board = SummaryWriter(folder / "tb", purge_step=first_step + 1)  # hides later steps that a failed start wrote
    if (config := folder / "config.yaml").is_file():
        board.add_text("config", "".join(f"    {line}\n" for line in config.read_text().splitlines()), first_step)
        settings = {
            name: value if isinstance(value, bool | int | float) else str(value)
            for name, (value, _) in read_file(config).items()
        }
        for summary in hparams(settings, dict.fromkeys(_RESULTS)):  # SummaryWriter.add_hparams would open a second run
            board._get_file_writer().add_summary(summary)
    return board
