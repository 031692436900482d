"""A Logger that writes to MLflow, and the only module that imports it."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steploop.core.extras import import_extra

__all__ = ["MLflow"]

_MOST_VALUE_CHARACTERS = 6000  # MLflow refuses longer parameters


class MLflow:
    """Metrics and Config of a run in an MLflow store: a server, or a local file.

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
        tracking = import_extra("mlflow.tracking", extra="mlflow", purpose="Logging to MLflow")
        import os

        uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        uri = uri or f"sqlite:///{run_directory.resolve().parent / 'mlflow.db'}"
        # the client and not the module's functions: those keep one active run for the whole process
        self._client = tracking.MlflowClient(tracking_uri=uri)
        found = self._client.get_experiment_by_name(experiment)
        identity = self._client.create_experiment(experiment) if found is None else found.experiment_id
        run = self._client.create_run(identity, run_name=run_directory.resolve().name)
        self._run = run.info.run_id
        params = [
            self._entities.Param(key, str(value)[:_MOST_VALUE_CHARACTERS]) for key, value in config.items()
        ]
        if params:
            self._client.log_batch(self._run, params=params)

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        """Add the numbers of a step, in one request."""
        now = int(time.time() * 1000)
        metrics = [self._entities.Metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def close(self) -> None:
        """End the run in the store."""
        self._client.set_terminated(self._run)
