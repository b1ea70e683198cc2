"""The samples that could not be decoded: each is replaced, listed in RUN/bad_samples.txt, and counted."""

from pathlib import Path

from maedistill.errors import DataError
from maedistill.processes import distributed
from maedistill.runs.progress import Progress
from maedistill.runs.records import AppendOnlyFile

_LEAST_SEEN = 10_000  # max_bad_fraction is taken of at least this many samples, so one bad image cannot end a run


class BadSampleLog:
    """Collects the bad samples of this rank between two counts. max_fraction: of the samples seen by the run."""

    def __init__(self, path: Path, *, max_fraction: float, global_batch: int) -> None:
        self.lines = AppendOnlyFile(path, unique=True)
        self.max_fraction, self.global_batch = max_fraction, global_batch
        self._new: list[str] = []

    def add(self, lines: list[str]) -> None:
        """Remember bad samples of this rank, each as a line `NAME: why`."""
        self._new += lines

    def count(self, progress: Progress) -> None:
        """Write and count the new bad samples of all ranks. Collective. Raises DataError if they are too many."""
        new = [line for lines in distributed.gather_objects(self._new) for line in lines]
        if new and distributed.is_main():
            self.lines.append(*sorted(new))
        self._new = []
        progress.bad_samples += len(new)
        seen = max(_LEAST_SEEN, progress.step * self.global_batch)
        if progress.bad_samples > self.max_fraction * seen:
            raise DataError(
                f"{progress.bad_samples} bad samples, more than data.max_bad_fraction={self.max_fraction:g} allows",
                f"see {self.lines.path}; repair the shards or raise the limit",
            )
