"""Read what a resume needs from the log: seconds, last metrics, compiled or not."""

from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from steploop.runs.directory import RunDirectory
from steploop.runs.logs import read_json_lines
from steploop.runs.record_values import is_count, is_duration, is_whole_line

__all__ = ["Past", "read_past"]


@attrs.frozen(kw_only=True)
class Past:
    """How far a run came before it ended.

    Attributes:
        seconds: of all its processes.
        metrics: of its last evaluation; empty where there was none.
        compiled: which form of the step ``--compile auto`` has chosen; None where it has not.
        forms: the lines that count forms of batches, which a compiled step goes by.
        evaluated: (phase, attempted steps) of each evaluation.
    """

    seconds: float = 0.0
    metrics: Mapping[str, float | None] = attrs.field(factory=dict)
    compiled: bool | None = None
    forms: Sequence[Mapping[str, Any]] = ()
    evaluated: frozenset[tuple[int, int]] = frozenset()

    def forms_seen(self, phase: int, attempted: int) -> dict[str, int]:
        """Form of a batch -> how often it had come in a phase after so many attempted steps."""
        lines = [
            line for line in self.forms if line.get("phase", 0) == phase and line["attempted"] <= attempted
        ]
        return {line["batch_form"]: line["seen"] for line in lines}


def read_past(directory: RunDirectory, status: Mapping[str, Any]) -> Past:
    """Read metrics.jsonl, leaving out what is nothing that a run writes.

    Args:
        directory: of the run.
        status: what status.json says.
    """
    lines = [line for line in read_json_lines(directory.metrics) if is_whole_line(line)]
    times: list[Any] = [status.get("seconds"), *(line.get("time_s") for line in lines)]
    forms = [line.get("form") for line in lines if line.get("event") == "compile"]
    chosen = [form for form in forms if form in {"compiled", "eager"}]
    return Past(
        seconds=max((float(time_s) for time_s in times if is_duration(time_s)), default=0.0),
        metrics=_newest_metrics(lines, status),
        compiled=chosen[-1] == "compiled" if chosen else None,
        forms=[
            line
            for line in lines
            if isinstance(line.get("batch_form"), str)
            and is_count(line.get("seen"))
            and is_count(line.get("attempted"))
        ],
        evaluated=frozenset(
            (line.get("phase", 0), line["attempted"])
            for line in lines
            if line.get("kind") == "eval"
            and is_count(line.get("phase", 0))
            and is_count(line.get("attempted"))
        ),
    )


def _newest_metrics(
    lines: Sequence[Mapping[str, Any]], status: Mapping[str, Any]
) -> Mapping[str, float | None]:
    """The metrics of the newest evaluation that the log or the status knows; the log may lack lines."""
    said: Mapping[str, float | None] = status.get("metrics") or {}
    for line in reversed(lines):
        if line.get("kind") == "eval" and "metrics" in line:
            known = status.get("step")
            newer = bool(said) and isinstance(known, int) and known >= line.get("step", 0)
            logged: Mapping[str, float | None] = line["metrics"]
            return said if newer else logged
    return said
