"""The loggers that an option of a run turns on, in one table."""

from collections.abc import Mapping
from typing import Final

__all__ = ["LOGGER_OPTIONS"]

# The option's name -> what it does. A field of Request and a parameter of steploop.run have the same name.
LOGGER_OPTIONS: Final[Mapping[str, str]] = {
    "tensorboard": "Write TensorBoard event files into the run directory.",
    "csv": "Write metrics.csv into the run directory.",
    "mlflow": "Log to MLflow: to $MLFLOW_TRACKING_URI, or to mlflow.db beside the run directory.",
    "wandb": "Log to Weights & Biases; offline where WANDB_MODE=offline.",
}
