"""The folder of a run: its settings, its history, and whether a command may continue it.

RUN/config.yaml      the settings, resolved        RUN/run.json       what was used: data, teacher, license, versions
RUN/metrics.jsonl    one object per logged step    RUN/exit.json      how the last start ended
RUN/checkpoints/     see checkpoint.py             RUN/pictures/      reconstruction sheets, if any
RUN/predictions/     of each sample an epoch ago, with distill.past.source=predictions
RUN/bad_samples.txt  samples that did not decode   RUN/report.md      the summary, with the next command
RUN/nonfinite.jsonl  updates that were not applied, with their samples
RUN/train.log        what rank 0 printed, start after start
RUN/trackers/        the ids of the run in trackers, and its last pictures there
RUN/lock             held while a process trains here, see `FolderLock`
"""

import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from maedistill.config.finetune import FinetuneConfig
from maedistill.config.pretrain import PretrainConfig
from maedistill.config.render import config_yaml
from maedistill.config.schema import RunConfig
from maedistill.durable import make_folder
from maedistill.errors import ConfigError, DataError, Preempted, UserError, device_error
from maedistill.escaping import shown, warn
from maedistill.processes import distributed
from maedistill.runs.checkpoint import checkpoint_steps, latest_step
from maedistill.runs.lock import FolderLock
from maedistill.runs.previous import (
    CHECKPOINTS,
    CONFIG,
    METADATA,
    known_metadata,
    read_config,
    read_metadata,
    read_previous,
    require_same,
)
from maedistill.runs.provenance import describe_start, header_lines, is_begun_by_program, is_restart, job
from maedistill.runs.records import write_text
from maedistill.runs.train_log import TrainLog

_BEFORE_A_RUN = {"exit.json", "lock", "pictures"}  # left by a start that failed early
_OF_THE_FIRST_START = ("init", "origin", "peers")
# What --fresh deletes, in this order: a kill in between leaves no finished run without checkpoints, and no checkpoints
# without their records. config.yaml and run.json are written over. Files of other names are a user's. What other
# commands write about a run is of it, too: a page or a study would take it for the next one's.
_OF_A_RUN = ["exit.json", "checkpoints", "metrics.jsonl", "bad_samples.txt", "nonfinite.jsonl", "train.log", "report.*"]
_OF_A_RUN += ["curves.*", "pictures", "predictions", "tb", "export", "export_exit*", "export_peer*", "scorecard.json"]
_OF_A_RUN += ["published", "codistillation.json", "trackers", "wandb", "predictions.csv", "test.json"]


class RunFolder:
    """Paths inside a run folder, and the small files that are not checkpoints or metrics. Only rank 0 writes."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(os.path.expanduser(path))  # Path.expanduser raises for an unknown user
        self.config = self.path / CONFIG
        self.checkpoints = self.path / CHECKPOINTS
        self.pictures = self.path / "pictures"
        self.report = self.path / "report.md"
        self.bad_samples = self.path / "bad_samples.txt"
        self.nonfinite = self.path / "nonfinite.jsonl"
        self.log = TrainLog(self.path / "train.log")
        self._run_json = self.path / METADATA
        self.texts: dict[str, str] = {}  # config.yaml and run.json of this start, which every checkpoint gets
        self._lock: FolderLock | None = None
        self._in_use = False  # by another process, whose records must not change
        self.is_ours = False  # rank 0 has opened the folder; each rank sets this itself

    @property
    def title(self) -> str:
        """Name the run in a picture: its folder and two above."""
        return "/".join(self.path.absolute().parts[-3:])

    def open(
        self, config: RunConfig, metadata: dict[str, Any], *, execution: dict[str, Any], fresh: bool, extend: bool
    ) -> None:
        """Create the folder, or check that `config` continues its run; then take its lock and write both files.

        metadata: the content of run.json for this start; `data` and `teacher_weights` must not change once there is a
        checkpoint. execution: what this start runs on, for its record. fresh: delete the run in the folder and start
        over. Raises ConfigError if another process runs in the folder, or if it belongs to other settings, data or
        teachers; the error names the difference.
        """
        self.check(config, metadata, fresh=fresh, extend=extend)
        try:
            make_folder(self.path)
            self._lock = FolderLock(self.path)
            if fresh:
                self._clear()
            for stray in self.path.glob(".*.tmp"):  # a small file that a kill cut short
                stray.unlink()
        except OSError as error:
            raise ConfigError(f"run: {self.path} cannot be written to ({error})", "use another run=") from error
        except ConfigError:
            self._in_use = True
            raise
        before = known_metadata(self.path) if not fresh else {}
        if checkpoint_steps(self.checkpoints):  # init and origin are those of the first start
            metadata = metadata | {name: before[name] for name in _OF_THE_FIRST_START if name in before}
        start = describe_start(execution) | {"step": latest_step(self.checkpoints) or 0}  # which it continues
        run_json = json.dumps({**metadata, "starts": [*before.get("starts", []), start]}, indent=1) + "\n"
        self.texts = {METADATA: run_json, CONFIG: config_yaml(config)}
        write_text(self._run_json, run_json)  # first: it makes this a run's folder
        # exit.json of the previous start goes after run.json, which a peer takes for this start's unless the run has
        # ended, and before config.yaml: it does not say how a run with these settings ended.
        (self.path / "exit.json").unlink(missing_ok=True)
        write_text(self.config, self.texts[CONFIG])
        self.log.begin(*header_lines(start))

    def amend(self, **entries: Any) -> None:
        """Change entries of run.json, here and in the checkpoints to come."""
        self.texts[METADATA] = json.dumps(json.loads(self.texts[METADATA]) | entries, indent=1) + "\n"
        write_text(self._run_json, self.texts[METADATA])

    def check(self, config: RunConfig, metadata: dict[str, Any], *, fresh: bool, extend: bool) -> None:
        """Run the checks of `open` without writing anything."""
        foreign = self._foreign()
        if fresh and CHECKPOINTS in foreign:
            raise ConfigError(
                f"run: {self._run_json} is gone, and without it the checkpoints cannot be trusted",
                "restore it from a copy, or use another run=",
            )
        if foreign and not checkpoint_steps(self.checkpoints):
            raise ConfigError(f"run: {self.path} holds something other than a run ({foreign[0]})", "use another run=")
        if os.path.lexists(self.checkpoints) and not os.path.isdir(self.checkpoints):
            raise ConfigError(f"run: {self.checkpoints} is not a folder", "remove it, or use another run=")
        if checkpoint_steps(self.checkpoints) and not fresh:  # otherwise there is nothing to protect
            previous = read_previous(self.path, config)
            for line in previous.lost:
                warn(line)
            require_same(self.path, previous, config, metadata, extend=extend)

    def describe_checkpoints(self) -> str:
        """Say how many checkpoints the folder has, for the question whether to delete them."""
        steps = [step for step, _ in checkpoint_steps(self.checkpoints)]
        number = f"{len(steps)} checkpoint{'s' * (len(steps) != 1)}, the newest of step {max(steps, default=0):,}"
        return f"{self.path} holds {number if steps else 'a run without checkpoints'}"

    def load_config(self) -> PretrainConfig | FinetuneConfig:
        """Load the settings of the run in this folder, of any stage."""
        return read_config(self.path)

    def metadata(self) -> dict[str, Any]:
        """Read run.json; empty before the first start. Raises DataError if it is damaged."""
        return read_metadata(self.path)

    def was_begun_by_this_job(self) -> bool:
        """Return whether this start repeats the one that began the run. Raises DataError if run.json is damaged."""
        if not is_restart():
            return False
        starts = self.metadata().get("starts", [])
        return bool(starts) and starts[0].get("job") == job()

    @contextmanager
    def recorded_end(self) -> Iterator[None]:
        """Write exit.json however the block ends, set-up included: torchrun hides exit codes, this file does not."""
        try:
            yield
        except BaseException as raised:
            error = device_error(raised) or raised
            if isinstance(error, UserError):
                self._write_end(error.exit_code, error.cause)
            elif isinstance(error, Preempted):
                self._write_end(error.exit_code, str(error).splitlines()[0])
            else:
                by_hand = isinstance(error, KeyboardInterrupt)
                reason = "stopped by Ctrl-C" if by_hand else f"{type(error).__name__}: {error}"
                self._write_end(130 if by_hand else 1, reason)
            if error is raised:
                raise
            raise error from raised
        self._write_end(0, "finished")

    def record_error(self, error: UserError) -> None:
        """Write exit.json for a process that is about to be killed, or on behalf of a lost rank 0."""
        if self.is_ours:
            self._write(error.exit_code, error.cause)

    @property
    def command(self) -> str | None:
        """Return the command that continues the run, None if a launcher started it, whose words are unknown here."""
        words = [word for word in sys.argv if word not in ("--fresh", "--yes")]
        program = [] if words[0] == "maedistill" else ["python"]
        return shown(shlex.join([*program, *words])) if distributed.world_size() == 1 else None

    def leave_at_once(self) -> NoReturn:
        """End the process for a second Ctrl-C: record it and say which step was saved last."""
        if distributed.is_main():
            step = latest_step(self.checkpoints)
            saved = "nothing is saved" if step is None else f"step {step} is the last one saved"
            reason = f"stopped at once by a second Ctrl-C: {saved}"
            if self.is_ours:
                self._write(130, reason)
                self.log.add(reason)
            how = f"continue with: {self.command}" if self.command else "the same command continues from there"
            with suppress(OSError):  # nobody reads it
                os.write(2, f"\n{reason}\n{how}\n".encode(errors="replace"))
        os._exit(130)

    def _clear(self) -> None:
        """Delete what a run writes, and nothing else."""
        for path in (path for name in _OF_A_RUN for path in self.path.glob(name)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _write_end(self, exit_code: int, reason: str) -> None:
        if self._in_use or not distributed.is_main():
            return
        if self._lock is None:  # this process has not opened the folder
            is_read = is_begun_by_program() or distributed.world_size() > 1 or self._run_json.is_file()
            if not is_read or checkpoint_steps(self.checkpoints) or self._foreign():
                return  # a refused start leaves nothing behind, and the record of the run in the folder as it is
        self._write(exit_code, reason)
        if self._lock is not None:
            self._lock.release()

    def _write(self, exit_code: int, reason: str) -> None:
        step, reason = latest_step(self.checkpoints) or 0, shown(reason)
        end = {"exit_code": exit_code, "reason": reason, "step": step}  # step: where the same command resumes
        try:
            make_folder(self.path)
            write_text(self.path / "exit.json", json.dumps(end) + "\n")
        except (OSError, DataError) as error:  # must not hide the error that ended the run
            warn(f"exit.json could not be written: {error}")

    def _foreign(self) -> list[str]:
        """Return the names in a non-empty folder that is not a run's; they may be a user's data."""
        names = [name for name in os.listdir(self.path) if name[0] != "."] if os.path.isdir(self.path) else []
        return [] if "run.json" in names else sorted(set(names) - _BEFORE_A_RUN)
