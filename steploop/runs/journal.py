"""Pass each line of a run to metrics.jsonl, the loggers and the screen."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from steploop.runs.logs import Loggers
from steploop.runs.logs.screens import Screen

__all__ = ["LoggedSteps", "RunJournal"]

_PLACE = {"step", "attempted", "epoch", "batch", "epochs", "phase"}


def _numbers(values: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """Select what a logger can draw: finite numbers, without counters of the position."""
    return {
        prefix + name: float(value)
        for name, value in values.items()
        if name not in _PLACE and isinstance(value, (int, float)) and math.isfinite(value)
    }


class LoggedSteps:
    """Turns lines of the log into what loggers get: a step and its numbers.

    A later phase of a recipe counts its steps from 0 again. For the loggers they go on behind the last step that was
    logged of the phase before: the curves of two phases do not overlay.
    """

    def __init__(self) -> None:
        self._phase = self._before = self._newest = 0

    def read(self, lines: Iterable[Mapping[str, Any]]) -> Iterator[tuple[int, dict[str, float]]]:
        """Give (step, values) of each line that has numbers; the lines come in the order of the run."""
        for line in lines:
            if (kind := line["kind"]) not in {"train", "eval"}:
                continue
            if (phase := line.get("phase", 0)) > self._phase:
                self._phase, self._before, self._newest = phase, self._before + self._newest, 0
            self._newest = line["step"]
            values = _numbers(line, "train/") if kind == "train" else _numbers(line["metrics"], "eval/")
            yield self._before + self._newest, values


class RunJournal:
    """Passes each line on to the file, the loggers and the screen.

    Args:
        lines: the file.
        loggers: those that were asked for.
        logged: which numbers they get; one for all phases.
        screen: shows it.
        steps_per_epoch: batches in an epoch.
        epochs: how many there will be.
        phase: which of a recipe's phases this is, from 0; the lines of a later one say so.
        on_evaluation: called with each evaluation.
    """

    def __init__(
        self,
        lines: Callable[[Mapping[str, Any]], None],
        loggers: Loggers,
        logged: LoggedSteps,
        screen: Screen,
        *,
        steps_per_epoch: int,
        epochs: int,
        phase: int = 0,
        on_evaluation: Callable[[Mapping[str, Any]], None] = lambda _: None,
    ) -> None:
        self._lines = lines
        self._loggers = loggers
        self._logged = logged
        self._screen = screen
        self._steps_per_epoch = steps_per_epoch
        self._epochs = epochs
        self._phase = {"phase": phase} if phase else {}
        self._on_evaluation = on_evaluation
        self._begun: tuple[float, int] | None = None  # when this process logged first, and how far it was

    def train(self, line: Mapping[str, Any]) -> None:
        """Write a log point."""
        self._write("train", line)
        batches = (line["epoch"] - 1) * self._steps_per_epoch + line["batch"]
        total = max(self._epochs * self._steps_per_epoch, 1)
        self._screen.train(
            {**line, "epochs": self._epochs}, done=batches / total, left_s=self._left(batches, total)
        )

    def _left(self, batches: int, total: int) -> float | None:
        """Estimate the seconds left, by the pace since the first log point, evaluations included."""
        now = time.monotonic()
        if self._begun is None:
            self._begun = now, batches
        since, first = self._begun
        return (now - since) / (batches - first) * (total - batches) if batches > first else None

    def evaluation(self, line: Mapping[str, Any]) -> None:
        """Write an evaluation."""
        self._write("eval", line)
        self._screen.evaluation(line)
        self._on_evaluation(line)

    def event(self, line: Mapping[str, Any]) -> None:
        """Write an event."""
        self._write("event", line)

    def _write(self, kind: str, line: Mapping[str, Any]) -> None:
        line = {"kind": kind, **self._phase, **line}
        for step, numbers in self._logged.read([line]):
            self._loggers(step, numbers)
        self._lines(line)
