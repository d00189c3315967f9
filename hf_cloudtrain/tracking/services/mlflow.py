"""MLflow, also as managed by SageMaker: it creates the ids, and appends what is sent, so nothing is sent twice.

Whatever the tracking URI (a server, `sqlite:///…`, or an ARN with the plug-in sagemaker-mlflow), a run is created and found
through MLflow's own functions. Parameters of a run cannot change: one that differs on a new machine, such as `output_dir`, would
take the metrics of its batch with it, so a run that goes on sends none.
"""

from __future__ import annotations

import os
import re
from typing import Any, ClassVar

from hf_cloudtrain.tracking.services.service import TrackerContent, TrackerService, TrackerStart


class MLflow(TrackerService):
    """MLflow."""

    name = "mlflow"
    trainer_callback = "MLflowCallback"
    id_argument = "run_id"
    has_fixed_parameters = True
    ends_with_training = True
    # By default MLflow waits up to 120 s for an answer and asks up to 8 times.
    patience: ClassVar[dict[str, str]] = {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    }

    def __init__(self) -> None:
        self._is_users = False
        """Whether the user's script had begun the run before the callback did."""

    def users_id(self, start: TrackerStart) -> str | None:
        """Of the run that the script has begun, else `MLFLOW_RUN_ID`."""
        import mlflow

        active = mlflow.active_run()
        return str(active.info.run_id) if active is not None else os.environ.get("MLFLOW_RUN_ID") or None

    def new_id(self, start: TrackerStart) -> str:
        """Of a run that is created now, as MLflow's own start creates it, and started again by the callback."""
        import mlflow

        run = mlflow.start_run(run_name=start.run_name)
        mlflow.end_run("SCHEDULED")
        return str(run.info.run_id)

    def lacks(self, tracker_id: str) -> str | None:
        """It was deleted, is of a different server, or the user has named a different experiment since."""
        import mlflow
        from mlflow.exceptions import MlflowException

        client = mlflow.MlflowClient()
        try:
            run = client.get_run(tracker_id)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return "MLflow has no run with this id"
            raise
        if run.info.lifecycle_stage != "active":
            return "it was deleted"
        wanted = os.environ.get("MLFLOW_EXPERIMENT_NAME")
        if wanted is None:
            return None
        experiment = client.get_experiment_by_name(wanted)
        same = experiment is not None and experiment.experiment_id == run.info.experiment_id
        return None if same else f"it is not in the experiment {wanted!r}"

    def environment(self, tracker_id: str) -> dict[str, str]:
        """`mlflow.start_run` takes the id, and removes its variable; nothing where the run is active already."""
        import mlflow

        return {} if mlflow.active_run() is not None else {"MLFLOW_RUN_ID": tracker_id}

    def arguments(self, tracker_id: str, start: TrackerStart) -> dict[str, Any]:
        """Of `mlflow.start_run`."""
        return {"run_id": tracker_id}

    def before_start(self, callback: Any, args: Any, tracker_id: str, start: TrackerStart) -> dict[str, str]:
        """No parameters in a run that goes on, and metrics in their order, so that the last step tells what was sent."""
        import mlflow

        self._is_users = mlflow.active_run() is not None
        os.environ.setdefault("MLFLOW_ASYNC_LOGGING_THREADPOOL_SIZE", "1")
        return {"MLFLOW_MAX_LOG_PARAMS": "0"} if self._steps(tracker_id) else {}

    def sent(self, tracker_id: str) -> TrackerContent:
        """The last step of each metric, by one request."""
        return TrackerContent(self._steps(tracker_id))

    def metric(self, name: str) -> str:
        """Trainer's callback replaces what MLflow does not accept."""
        return re.sub(r"[^0-9A-Za-z_\-\.\ :/]", "_", name)

    def page(self, tracker_id: str) -> str | None:
        """Of a server; a database or a folder has no page."""
        import mlflow

        uri = mlflow.get_tracking_uri().rstrip("/")
        if not uri.startswith(("http://", "https://")):
            return None
        experiment = mlflow.MlflowClient().get_run(tracker_id).info.experiment_id
        return f"{uri}/#/experiments/{experiment}/runs/{tracker_id}"

    def follows(self, previous: str, reason: str) -> None:
        """As tags."""
        import mlflow

        mlflow.set_tags({"cloudtrain.follows": previous, "cloudtrain.reason": reason})

    def end_again(self, callback: Any) -> bool:
        """As the callback does at the end of a training."""
        import mlflow

        if self._is_users or not callback._auto_end_run:
            return False
        mlflow.end_run()
        return True

    def flush(self) -> None:
        """Metrics are sent by threads of MLflow."""
        import mlflow

        mlflow.flush_async_logging()

    def _steps(self, tracker_id: str) -> dict[str, int]:
        import mlflow

        metrics = mlflow.MlflowClient().get_run(tracker_id).to_proto().data.metrics
        return {metric.key: int(metric.step) for metric in metrics}
