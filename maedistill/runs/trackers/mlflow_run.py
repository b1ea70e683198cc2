"""MLflow. Server and experiment are its own settings: MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME."""

from collections.abc import Mapping
from typing import Any

from maedistill.escaping import say
from maedistill.runs.folder import RunFolder
from maedistill.runs.trackers.tracker import End, Opening

ENVIRONMENT = {  # unless it is set; before the import
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "4",  # its own would wait four minutes for a dead server,
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # and 120 s for one that hangs
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # there may be a password in the address
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
_NO_GIT = {f"mlflow.source.git.{name}": "" for name in ("repoURL", "branch", "commit")}  # an address may hold a token
_STATUS = {"finished": "FINISHED", "killed": "KILLED", "failed": "FAILED"}


class MlflowRun:
    """A run of MLflow. It belongs to the thread that opens it, so a Python caller may have one of its own."""

    def __init__(self, opening: Opening) -> None:
        import mlflow

        self._mlflow = mlflow
        run = mlflow.start_run(run_id=opening.id, run_name=RunFolder(opening.folder).title, tags=_NO_GIT)
        self.id: str = run.info.run_id
        self.last = {metric.key: metric.step for metric in run.data._metric_objs}  # the newest of each
        if opening.id is None:
            mlflow.log_params(opening.settings)
        say(f"mlflow   run {self.id} at {mlflow.get_tracking_uri()}")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers by tag."""
        self._mlflow.log_metrics(dict(values), step=step, synchronous=True)

    def picture(self, step: int, name: str, pixels: Any) -> None:
        """Log an image, uint8 [H, W, 3]."""
        self._mlflow.log_image(pixels, key=name, step=step, synchronous=True)

    def close(self, end: End) -> None:
        """Say how the run ended."""
        self._mlflow.end_run(_STATUS[end])
