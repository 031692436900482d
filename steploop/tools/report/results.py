"""Say how a run went: result, time per phase, how to run it again."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import attrs

from steploop.runs.journal_lines import attempted_of
from steploop.runs.reading import Line, RunRecord
from steploop.runs.safe_text import safe_text
from steploop.tools.report.run_labels import short

__all__ = ["Phases", "Result", "duration", "epoch_of", "how_to_reproduce", "outcome", "phases", "result_of"]


@attrs.frozen(kw_only=True)
class Result:
    """The evaluation that counts: the best one, or the last where nothing was monitored.

    Attributes:
        metric: the name of the number.
        value: the number; None where it was not finite.
        step: attempted steps when it was measured.
        epoch: in which epoch, counted from 1, or None.
        metrics: all numbers of that evaluation.
        is_best: whether it is the best of a monitored metric.
    """

    metric: str
    value: float | None
    step: int
    epoch: int | None
    metrics: Mapping[str, float | None]
    is_best: bool


def _monitored(run: RunRecord, line: Line) -> str:
    """The name of the metric that decided which evaluation was best."""
    if run.status.metric is not None:
        return run.status.metric
    metrics: Mapping[str, Any] = line.get("metrics", {})
    others = [name for name in metrics if name != "loss"]
    return (others or list(metrics) or ["loss"])[0]


def result_of(run: RunRecord) -> Result | None:
    """The result of a run, or None where nothing was evaluated."""
    if not run.evals:
        return None
    line = run.best() or run.evals[-1]
    metrics = line.get("metrics", {})
    name = _monitored(run, line)
    return Result(
        metric=name,
        value=metrics.get(name),
        step=attempted_of(line),
        epoch=epoch_of(line),
        metrics=metrics,
        is_best=run.best() is not None,
    )


def epoch_of(line: Line) -> int | None:
    """The epoch that a line belongs to, counted from 1: the one that its last batch was of."""
    epoch = line.get("epoch")
    return max(epoch, 1) if isinstance(epoch, int) else None


def outcome(run: RunRecord) -> str:
    """One sentence: what became of the run."""
    state = run.state
    error = run.status.error or ""
    words = {
        "finished": "Finished",
        "running": "Still running",
        "interrupted": "Interrupted; it can be resumed",
        "failed": "Failed",
        "died": "Its process is gone without having finished; it can be resumed",
    }.get(state, "Its state is not known")
    stopped = any(event.get("event") == "early_stop" for event in run.events)
    reason = (
        f": {error}"
        if error and state == "failed"
        else ", stopped early"
        if stopped and state == "finished"
        else " at the limit of steps; it can be resumed"
        if state == "finished" and run.status.ending == "limit"
        else ""
    )
    return f"{words}{reason}".rstrip(".") + "."


@attrs.frozen(kw_only=True)
class Phases:
    """Where the time went, in seconds.

    Attributes:
        starting: until the first step was logged: building model and data, and that step.
        training: in steps.
        waiting: for the next batch.
        evaluation: in evaluations.
    """

    starting: float
    training: float
    waiting: float
    evaluation: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.starting + self.training + self.waiting + self.evaluation


def phases(run: RunRecord) -> Phases:
    """Time per phase: evaluations are measured; waiting for data is its share of the rest, line by line."""
    lines = sorted(
        (*run.train, *run.evals), key=lambda line: (attempted_of(line), line.get("kind") == "eval")
    )
    evaluation = sum(float(line.get("eval_s", 0.0)) for line in run.evals)
    starting = float(run.train[0].get("time_s", 0.0)) if run.train else 0.0
    waiting = pending = 0.0
    last = starting
    for line in lines:
        now = float(line.get("time_s", 0.0))
        span = now - last if now >= last else now
        last = now
        if line.get("kind") == "eval":
            pending += max(span - float(line.get("eval_s", 0.0)), 0.0)
        else:
            waiting += float(line.get("data_wait", 0.0)) * (span + pending)
            pending = 0.0
    rest = max(run.time_s - evaluation - starting, 0.0)
    waiting = min(waiting, rest)
    return Phases(starting=starting, training=rest - waiting, waiting=waiting, evaluation=evaluation)


def duration(seconds: float) -> str:
    """Seconds in words: 4.2 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def how_to_reproduce(run: RunRecord) -> Sequence[str]:
    """Shell lines that do this run again, from the recipe that it kept a copy of."""
    versions = run.config.get("versions", {})
    # a build's own label (2.14.1+cpu) is not known to the package index
    known = ((name, versions[name].partition("+")[0]) for name in ("steploop", "torch") if name in versions)
    wanted = [f"{name}=={version}" for name, version in known]
    lines = [f"pip install {shlex.join(wanted)}"] if wanted else []
    if command := run.config.get("command"):
        program, *words = command
        lines.append(shlex.join([PurePath(program).name, *words]))
    source = shlex.quote(safe_text(run.path / "recipe.py"))
    fields = " ".join(f"--set {shlex.quote(f'{k}={short(v)}')}" for k, v in run.fields.items() if _plain(v))
    if run.source is not None:
        lines += [
            "# or, from the copy of the recipe that the run kept, with every field of its Config:",
            f"steploop run {source} {fields}",
        ]
    return lines


def _plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str)) and str(value) != ""
