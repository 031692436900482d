"""A Logger that writes to Weights & Biases, and the only module that imports it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from steploop.core.extras import import_extra
from steploop.runs.logs.logger_identity import recall, remember

__all__ = ["WandB"]

Mode = Literal["online", "offline"]


class WandB:
    """Metrics and Config of a run in Weights & Biases; a resume goes on with the run that was begun there.

    Args:
        run_directory: of the run; its name becomes the run's name, and wandb's files go into ``wandb/`` in it.
        config: what is recorded as the run's config.
        project: of the run.
        mode: "offline" writes files only, for ``wandb sync`` later; None: what the environment variable WANDB_MODE says.

    Raises:
        MissingExtraError: wandb is not installed.
    """

    def __init__(
        self,
        run_directory: Path,
        config: Mapping[str, Any],
        *,
        project: str = "steploop",
        mode: Mode | None = None,
    ) -> None:
        wandb = import_extra("wandb", extra="wandb", purpose="Logging to Weights & Biases")
        # what it prints at the beginning and the end would stand between the lines of the screen
        settings = wandb.Settings(silent=True, console="off")
        self._run = wandb.init(
            dir=str(run_directory), name=run_directory.resolve().name, project=project, config=dict(config),
            mode=mode, settings=settings, reinit="create_new", id=recall(run_directory, "wandb").get("id"), resume="allow",
        )  # fmt: skip
        remember(run_directory, "wandb", {"id": self._run.id})
        self._run.define_metric("*", step_metric="applied_steps")

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        """Add the numbers of a step."""
        # several lines may come at one step (training and evaluation): wandb's own step may not fall or repeat
        self._run.log({**values, "applied_steps": step})

    def close(self) -> None:
        """Write out what is held back and end the run."""
        self._run.finish()
