"""A Logger that writes to Weights & Biases, and the only module that imports it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from steploop.core.extras import import_extra
from steploop.runs.logs.logger_identity import recall, remember

__all__ = ["WandB"]

Mode = Literal["online", "offline"]
_KINDS = ("train", "eval")  # what the names of a line begin with


class WandB:
    """Metrics and Config of a run in Weights & Biases; a resume goes on with the run that was begun there.

    No step is there twice, and none is missing: what a kill lost is logged again at the resume. Offline, wandb begins a
    folder of files for each process; one that a kill cut off is set aside as ``superseded-...``, which ``wandb sync``
    passes over, and its points are written into the new folder.

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
        self._directory = run_directory
        before = recall(run_directory, "wandb")
        self._run = wandb.init(
            dir=str(run_directory), name=run_directory.resolve().name, project=project, config=dict(config),
            mode=mode, settings=settings, reinit="create_new", id=before.get("id"), resume="allow",
        )  # fmt: skip
        self._cut_off = before.get("open")  # the folder of a process that did not close it
        # what is there already: the newest step of each kind of line
        self._there = {kind: int(step) for kind in _KINDS if (step := before.get(kind, "")).isdecimal()}
        self._newest = dict(self._there)
        self._remember(open=Path(self._run.dir).parent.name)
        self._run.define_metric("*", step_metric="applied_steps")
        self._run.define_metric("newest/*", hidden=True)

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        """Add the numbers of a step, unless they are there."""
        kind = next(iter(values), "").partition("/")[0]
        if step <= self._there.get(kind, -1):
            return
        self._newest[kind] = step
        # several lines may come at one step (training and evaluation): wandb's own step may not fall or repeat
        self._run.log({**values, "applied_steps": step, f"newest/{kind}": step})

    def rewrite(self, rows: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Log what a kill lost of the steps that stand; the rest is there."""
        if self._run.offline:
            self._set_aside()
        elif self._run.resumed:  # the service says how far it got
            self._there = {kind: int(self._run.summary.get(f"newest/{kind}", -1)) for kind in _KINDS}
        for step, values in rows:
            self(step, values)

    def _set_aside(self) -> None:
        """Take the files that a kill cut off from those that will be synced, unless they were."""
        cut_off = self._directory / "wandb" / (self._cut_off or "")
        if self._cut_off and not any(cut_off.glob("*.synced")) and cut_off.is_dir():
            cut_off.rename(cut_off.with_name(f"superseded-{cut_off.name}"))

    def close(self) -> None:
        """Write out what is held back and end the run."""
        self._run.finish()
        self._remember()

    def _remember(self, **values: str) -> None:
        steps = {kind: str(step) for kind, step in (self._there if values else self._newest).items()}
        remember(self._directory, "wandb", {"id": self._run.id, **steps, **values})
