"""What a run folder says of a run, finished or under way, for pages. Its import takes a fraction of a second."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from maedistill.config.finetune import FinetuneConfig
from maedistill.config.loader import load_config
from maedistill.config.pretrain import PretrainConfig
from maedistill.config.values import STAGES
from maedistill.errors import ConfigError, DataError, UserError
from maedistill.runs.history import FINISHED, last_end, read_metrics

PREDICTIONS = "predictions.csv"  # in the folder of a fine-tuning: `maedistill evaluate --predictions`


@dataclass(frozen=True)
class RecordedRun:
    """A run as its folder records it. name, place: on the page. ended: why the last start ended, None while it runs."""

    name: str
    path: Path
    config: PretrainConfig | FinetuneConfig
    metadata: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    ended: str | None
    place: int = 0

    @property
    def network(self) -> str:
        """Return timm's name of the network, with the width and depth that the run set: `vit_tiny (96 x 4)`."""
        network = self.metadata["network"]
        size = [str(network["arguments"][key]) for key in ("embed_dim", "depth") if key in network["arguments"]]
        return f"{network['name']} ({' x '.join(size)})" if len(size) == 2 else network["name"]

    @property
    def state(self) -> str:
        """Return whether the run is finished, in words. A run that was killed could not say so."""
        return {None: "running, or killed", FINISHED: "finished"}.get(self.ended, f"ended early: {self.ended}")

    def epoch_at(self, step: int) -> float:
        """Return the epochs done after a step."""
        known = [record for record in self.records if record.get("epoch") and record["step"]]
        return step * known[-1]["epoch"] / known[-1]["step"] if known else 0.0


def is_run(path: Path) -> bool:
    """Return whether a folder is that of a run."""
    return (path / "run.json").is_file()


def read_run(path: Path, name: str, place: int = 0) -> RecordedRun:
    """Read a run. Raises UserError for another folder and for damaged files."""
    with readable(path):
        if not is_run(path):
            raise ConfigError(
                f"{path} is not a run folder: it has no run.json",
                "name the folder of a run that has started, or of a study with results.json",
            )
        metadata, records = read_json(path / "run.json"), read_metrics(path)
        root = STAGES[metadata["stage"]]
        config: Any = load_config(path / "config.yaml", root=root, to_run=False).config
        if odd := [one for record in records for one in record.values() if not isinstance(one, int | float | None)]:
            raise TypeError(f"{odd[0]!r} is no number")
        return RecordedRun(name, path, config, metadata, records, last_end(path), place)


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object. Raises DataError for anything else, OSError for no file."""
    try:
        return dict(json.loads(file.read_text()))
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{file} cannot be read ({str(error)[:200]})", "restore it from a copy") from error


def written(file: Path) -> str:
    """Return when a file was last written, to the minute."""
    return datetime.fromtimestamp(file.stat().st_mtime).isoformat(" ", "minutes")


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Turn errors in the block about records of a folder that are not as expected into DataError."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error})", "check the permissions there, and the disk") from error
    except (LookupError, TypeError, ValueError, AttributeError, AssertionError, ArithmeticError) as error:
        raise DataError(
            f"{folder}: its records are damaged or of another version ({type(error).__name__}: {error})",
            "use the version that the run was made with, or restore the records from a copy",
        ) from error
