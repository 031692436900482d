"""The journal of a run: each line goes to metrics.jsonl, to the loggers and to the screen."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from steploop.errors import CheckpointWriteError
from steploop.runs.logs import JsonLines, Loggers
from steploop.runs.logs.screens import Screen

__all__ = ["RunJournal", "logged"]

_PLACE = {"step", "attempted", "epoch", "batch", "epochs", "phase"}


def _numbers(values: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """What a logger can draw: the finite numbers, without those that only say where we are."""
    return {
        prefix + name: float(value)
        for name, value in values.items()
        if name not in _PLACE and isinstance(value, (int, float)) and math.isfinite(value)
    }


def logged(lines: Iterable[Mapping[str, Any]]) -> Iterator[tuple[int, dict[str, float]]]:
    """The step and the numbers that the loggers are told of each log point and evaluation among ``lines``."""
    for line in lines:
        if line["kind"] == "train":
            yield line["step"], _numbers(line, "train/")
        elif line["kind"] == "eval":
            yield line["step"], _numbers(line["metrics"], "eval/")


class RunJournal:
    """Tells everybody.

    Args:
        lines: the file; None writes none.
        loggers: the user's.
        screen: shows it.
        steps_per_epoch: batches in an epoch.
        epochs: how many there will be.
        phase: which of a recipe's phases this is, from 0; the lines of a later one say so.
        on_evaluation: told of each evaluation besides.
    """

    def __init__(
        self,
        lines: JsonLines | None,
        loggers: Loggers,
        screen: Screen,
        *,
        steps_per_epoch: int,
        epochs: int,
        phase: int = 0,
        on_evaluation: Callable[[Mapping[str, Any]], None] = lambda _: None,
    ) -> None:
        self._lines = lines
        self._loggers = loggers
        self._screen = screen
        self._steps_per_epoch = steps_per_epoch
        self._epochs = epochs
        self._phase = {"phase": phase} if phase else {}
        self._on_evaluation = on_evaluation
        self._begun: tuple[float, int] | None = None  # when this process logged first, and how far it was

    def train(self, line: Mapping[str, Any]) -> None:
        """A log point."""
        self._write("train", line)
        batches = line["epoch"] * self._steps_per_epoch + line["batch"]
        total = max(self._epochs * self._steps_per_epoch, 1)
        self._screen.train(
            {**line, "epochs": self._epochs}, done=batches / total, left_s=self._left(batches, total)
        )

    def _left(self, batches: int, total: int) -> float | None:
        """Seconds left, by the pace since the first log point, evaluations included."""
        now = time.monotonic()
        if self._begun is None:
            self._begun = now, batches
        since, first = self._begun
        return (now - since) / (batches - first) * (total - batches) if batches > first else None

    def evaluation(self, line: Mapping[str, Any]) -> None:
        """An evaluation."""
        self._write("eval", line)
        self._screen.evaluation(line)
        self._on_evaluation(line)

    def event(self, line: Mapping[str, Any]) -> None:
        """Anything else."""
        self._write("event", line)

    def _write(self, kind: str, line: Mapping[str, Any]) -> None:
        line = {"kind": kind, **self._phase, **line}
        for step, numbers in logged([line]):
            self._loggers(step, numbers)
        if self._lines is None:
            return
        try:
            self._lines(line)
        except CheckpointWriteError as error:  # the log of a run is not worth the run
            self._screen.note(f"{error} The run goes on without it.")
            self._lines = None
