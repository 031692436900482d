"""Order the lines of ``metrics.jsonl`` by attempted steps, through crashes and phases."""

import heapq

from steploop.runs.record_values import Line

__all__ = ["Journal", "attempted_of", "from_one"]


def attempted_of(line: Line) -> int:
    """Return a line's attempted steps; an event may have only the applied steps."""
    return int(line.get("attempted", line.get("step", 0)))


def from_one(line: Line, config: Line) -> Line:
    """The line with its epoch counted from 1; 0.1.0 counted whole epochs, and said nothing of it in config.json."""
    epoch = line.get("epoch")
    if "epochs_from" in config or not isinstance(epoch, int):
        return line
    return {**line, "epoch": epoch + bool(line.get("batch"))}


class Journal:
    """The lines in one order of attempted steps. Adding a line takes logarithmic time, whatever their order.

    Attributes:
        train: the lines of training.
        evals: the lines of evaluations.
    """

    def __init__(self) -> None:
        self.train: list[Line] = []
        self.evals: list[Line] = []
        self._events: list[Line | None] = []  # None: dropped
        self._droppable: list[tuple[int, int]] = []  # heap of (- attempted steps, index in _events)
        self._phase = 0
        self._newest = (0, 0)  # attempted and applied steps of this phase, by the last line
        self._before = (0, 0)  # the same of the phases before

    @property
    def events(self) -> list[Line]:
        """Every other line, in the order of the file."""
        return [line for line in self._events if line is not None]

    def add(self, line: Line) -> None:
        """Put a line into its place."""
        kind, at, phase = line.get("kind"), attempted_of(line), int(line.get("phase", 0))
        if phase > self._phase:  # it counts its steps from 0 again
            self._before = (self._before[0] + self._newest[0], self._before[1] + self._newest[1])
            self._phase, self._newest = phase, (0, 0)
        if kind not in {"train", "eval"}:
            self._add_event(self._shifted(line))
            return
        if (
            at < self._newest[0]
        ):  # the steps after the last checkpoint were taken again: the later lines count
            self._drop_from(at + self._before[0])
        self._newest = (at, int(line.get("step", 0)))
        lines = self.train if kind == "train" else self.evals
        line = self._shifted(line)
        # an evaluation that was interrupted is made again after the resume
        if lines and attempted_of(lines[-1]) == attempted_of(line):
            lines.pop()
        lines.append(line)

    def _drop_from(self, start: int) -> None:
        for lines in (self.train, self.evals):
            while lines and attempted_of(lines[-1]) >= start:
                lines.pop()
        while self._droppable and -self._droppable[0][0] >= start:
            self._events[heapq.heappop(self._droppable)[1]] = None

    def _add_event(self, line: Line) -> None:
        if line.get("event") != "resumed":  # a resume stays on record
            heapq.heappush(self._droppable, (-attempted_of(line), len(self._events)))
        self._events.append(line)

    def _shifted(self, line: Line) -> Line:
        """Count a line's steps from the beginning of the first phase."""
        attempted, applied = self._before
        if not attempted or "attempted" not in line:
            return line
        return {
            **line,
            "attempted": attempted_of(line) + attempted,
            "step": int(line.get("step", 0)) + applied,
        }
