"""Checkpoints that somebody changed."""

from pathlib import Path

from maedistill.runs.manifest import COMPLETE, MANIFEST, write_manifest


def renew_manifest(checkpoint: Path) -> None:
    """Make manifest and completion marker true again, as somebody who changed a checkpoint and knows both would."""
    (checkpoint / MANIFEST).unlink()
    (checkpoint / COMPLETE).unlink()
    write_manifest(checkpoint)
