"""Puts the lines of ``metrics.jsonl`` into one order of attempted steps, whatever crashes and phases there were."""

from collections.abc import Mapping
from typing import Any

__all__ = ["Journal", "Line", "attempted_of", "is_number"]

Line = Mapping[str, Any]


def is_number(value: Any) -> bool:
    """Whether a value of a line is one (and no truth value)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def attempted_of(line: Line) -> int:
    """Where a line stands; an event may know only the applied steps."""
    value = line.get("attempted", line.get("step"))
    return int(value) if is_number(value) else 0


class Journal:
    """The lines in one order of attempted steps, whatever crashes and phases the run went through."""

    def __init__(self) -> None:
        self.train: list[Line] = []
        self.evals: list[Line] = []
        self.events: list[Line] = []
        self._phase = 0
        self._newest = (0, 0)  # attempted and applied steps of this phase, by the last line
        self._before = (0, 0)  # the same of the phases before

    def add(self, line: Line) -> None:
        """Put a line into its place."""
        kind, at, phase = line.get("kind"), attempted_of(line), int(line.get("phase") or 0)
        if phase > self._phase:  # it counts its steps from 0 again
            self._before = (self._before[0] + self._newest[0], self._before[1] + self._newest[1])
            self._phase, self._newest = phase, (0, 0)
        if kind not in {"train", "eval"}:
            self._place(self.events, line)
            return
        if (
            at < self._newest[0]
        ):  # what was done after the last checkpoint was done again: the later lines count
            start = at + self._before[0]
            for lines in (self.train, self.evals, self.events):
                lines[:] = [
                    old for old in lines if attempted_of(old) < start or old.get("event") == "resumed"
                ]
        self._newest = (at, int(line.get("step") or 0))
        self._place(self.train if kind == "train" else self.evals, line)

    def _place(self, lines: list[Line], line: Line) -> None:
        attempted, applied = self._before
        if attempted and "attempted" in line:
            line = {
                **line,
                "attempted": attempted_of(line) + attempted,
                "step": int(line.get("step") or 0) + applied,
            }
        # an evaluation that was interrupted is made again after the resume
        if lines is not self.events and lines and attempted_of(lines[-1]) == attempted_of(line):
            lines.pop()
        lines.append(line)
