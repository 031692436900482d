"""Where a run is recorded: metrics.jsonl, the loggers that were asked for, and status.json."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import attrs

from steploop.errors import CheckpointWriteError
from steploop.recipe.config_values import to_json
from steploop.runs.directory import Status
from steploop.runs.journal import LoggedSteps
from steploop.runs.journal_lines import from_one
from steploop.runs.logs import CsvTable, JsonLines, Logger, Loggers, TensorBoard
from steploop.runs.metric_values import plain_metrics
from steploop.runs.record_values import is_whole_line
from steploop.runs.requests import Request

__all__ = ["Outlets", "open_outlets"]


class _NoLines:
    """The log of a rank that writes nothing."""

    missing = None

    def __call__(self, line: Mapping[str, Any]) -> None:
        """Drop a line."""

    def keep(self, *_: Any) -> list[Mapping[str, Any]]:
        """There is none."""
        return []

    def flush(self) -> None:
        """Nothing is held back."""

    close = flush


@attrs.frozen
class Outlets:
    """The open files of a run's record."""

    lines: JsonLines | _NoLines
    loggers: Loggers
    status: Status
    recorded: Mapping[str, Any] = attrs.field(factory=dict)  # config.json as it was before a resume
    logged: LoggedSteps = attrs.field(factory=LoggedSteps)

    def tell(self, line: Mapping[str, Any], monitor: str | None) -> None:
        """Put an evaluation into status.json."""
        place = {"step": line["step"], "epoch": line["epoch"]}
        value = line["metrics"].get(monitor)
        best = {"best": {"metric": monitor, "value": value, **place}} if line["best"] else {}
        self.say(**place, metrics=plain_metrics(line["metrics"]), **best)

    def say(self, **values: Any) -> None:
        """Change entries of status.json; if it cannot be written now, the next time writes them too."""
        with suppress(CheckpointWriteError):
            self.status.update(**values, lost=self.lines.missing)

    def flush(self) -> None:
        """Write what is held back, before a checkpoint."""
        self.lines.flush()
        self.loggers.flush()

    def keep(self, stands: Callable[[Mapping[str, Any]], bool]) -> None:
        """Drop what was recorded of steps that will be taken again.

        Args:
            stands: which lines of metrics.jsonl stay.
        """
        kept = self.lines.keep(
            lambda line: is_whole_line(line) and stands(line),
            lambda line: from_one(line, self.recorded) if self.recorded else line,
        )
        self.loggers.rewrite(self.logged.read(kept))

    def close(self) -> None:
        """Write out what is held back; what cannot be is counted in status.json."""
        self.loggers.close()
        self.lines.close()
        if self.lines.missing is not None:
            self.say()


def open_outlets(
    request: Request,
    status: Status,
    note: Callable[[str], None],
    loggers: Sequence[Logger],
    *,
    writes: bool = True,
) -> Outlets:
    """Open the files of a run's record.

    Args:
        request: what was asked for, and where.
        status: of the run.
        note: called with a sentence if a logger fails, or a file cannot be written for a time.
        loggers: those of ``open_services``.
        writes: False for a rank whose record another one writes.
    """
    lines = JsonLines(request.directory.metrics, note) if writes else _NoLines()
    return Outlets(lines, Loggers(loggers, note), status, request.recorded)


def open_services(request: Request) -> list[Logger]:
    """The loggers that the options of a run ask for.

    Raises:
        MissingExtraError: one of them is not installed.
    """
    path, config = request.directory.path, to_json(request.config)
    loggers: list[Logger] = []
    if request.tensorboard:
        loggers.append(TensorBoard(path / "tensorboard"))
    if request.mlflow:
        from steploop.runs.logs.mlflow_logger import MLflow

        loggers.append(MLflow(path, config))
    if request.wandb:
        from steploop.runs.logs.wandb_logger import WandB

        loggers.append(WandB(path, config))
    if request.csv:
        loggers.append(CsvTable(path / "metrics.csv"))
    return loggers
