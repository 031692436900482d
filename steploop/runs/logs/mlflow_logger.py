"""A Logger that writes to MLflow, and the only module that imports it."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steploop.core.extras import import_extra
from steploop.runs.logs.logger_identity import recall, remember

__all__ = ["MLflow"]

_MOST_VALUE_CHARACTERS = 6000  # MLflow refuses longer parameters


class MLflow:
    """Metrics and Config of a run in an MLflow store: a server, or a local file.

    A resume goes on with the MLflow run that was begun, and logs no point a second time: MLflow keeps the first, times
    included.

    Args:
        run_directory: of the run; its name becomes the run's name.
        config: what is recorded as parameters.
        tracking_uri: of the store; None: a SQLite file ``mlflow.db`` beside the run directory, or what the environment
            variable MLFLOW_TRACKING_URI says.
        experiment: its name; made if it does not exist.

    Raises:
        MissingExtraError: mlflow is not installed.
    """

    def __init__(
        self,
        run_directory: Path,
        config: Mapping[str, Any],
        *,
        tracking_uri: str | None = None,
        experiment: str = "steploop",
    ) -> None:
        self._entities = import_extra("mlflow.entities", extra="mlflow", purpose="Logging to MLflow")
        self._exceptions = import_extra("mlflow.exceptions", extra="mlflow", purpose="Logging to MLflow")
        tracking = import_extra("mlflow.tracking", extra="mlflow", purpose="Logging to MLflow")
        import os

        uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        uri = uri or f"sqlite:///{run_directory.resolve().parent / 'mlflow.db'}"
        # the client and not the module's functions: those keep one active run for the whole process
        self._client = tracking.MlflowClient(tracking_uri=uri)
        found = self._client.get_experiment_by_name(experiment)
        identity = self._client.create_experiment(experiment) if found is None else found.experiment_id
        self._known: set[tuple[str, int]] = set()  # points that are in the store already
        there = self._go_on(recall(run_directory, "mlflow").get("run_id"))
        if there is None:
            run = self._client.create_run(identity, run_name=run_directory.resolve().name)
            there, self._run = {}, run.info.run_id
            remember(run_directory, "mlflow", {"run_id": self._run, "tracking_uri": uri})
        self._describe(config, there)

    def _go_on(self, run_id: str | None) -> dict[str, str] | None:
        """Open a run again; its parameters, or None if the store has no such run."""
        if run_id is None:
            return None
        try:
            run = self._client.get_run(run_id)
        except self._exceptions.MlflowException:
            return None
        if run.info.lifecycle_stage != "active":  # it was deleted there
            return None
        self._run = run_id
        self._client.update_run(run_id, status="RUNNING")
        for name in run.data.metrics:
            history = self._client.get_metric_history(run_id, name)
            self._known |= {(name, point.step) for point in history}
        return dict(run.data.params)

    def _describe(self, config: Mapping[str, Any], there: Mapping[str, str]) -> None:
        """Record the Config; MLflow lets no parameter change, so that one that did becomes a tag."""
        texts = {key: str(value)[:_MOST_VALUE_CHARACTERS] for key, value in config.items()}
        if params := [self._entities.Param(key, text) for key, text in texts.items() if key not in there]:
            self._client.log_batch(self._run, params=params)
        for key, text in texts.items():
            if there.get(key, text) != text:
                self._client.set_tag(self._run, f"resumed.{key}", text)

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        """Add the numbers of a step, in one request."""
        now = int(time.time() * 1000)
        metrics = [
            self._entities.Metric(name, value, now, step)
            for name, value in values.items()
            if (name, step) not in self._known
        ]
        if metrics:
            self._client.log_batch(self._run, metrics=metrics)

    def close(self) -> None:
        """End the run in the store."""
        self._client.set_terminated(self._run)
