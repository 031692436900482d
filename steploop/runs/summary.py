"""The summary of a run: the last line on stdout, and what status.json says at the end."""

import time
from collections.abc import Mapping
from typing import Any

import attrs

from steploop.recipe.recipe import Recipe, State
from steploop.runs.members import attempted_steps, lead
from steploop.runs.plan import Ending
from steploop.runs.requests import Request
from steploop.runs.signals import StopFlag, exit_code_of
from steploop.runs.text_names import readable

__all__ = ["Summary", "plain_metrics", "summarize"]


@attrs.frozen(kw_only=True)
class Summary:
    """How a run ended: the last line on stdout."""

    state: str
    exit_code: int
    run: str
    recipe: str
    data: str
    device: str
    precision: str
    epoch: int
    steps_attempted: int
    steps_applied: int
    steps_skipped: int
    metrics: Mapping[str, float | None]
    best: Mapping[str, Any] | None
    seconds: float


def plain_metrics(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    """The metrics with None for what JSON cannot hold."""
    infinity = float("inf")
    return {name: v if v is not None and abs(v) < infinity else None for name, v in metrics.items()}


def summarize(
    request: Request,
    recipe: Recipe,
    state: State,
    *,
    ending: Ending,
    stop: StopFlag,
    metrics: Mapping[str, float | None],
    since_s: float,
) -> Summary:
    """How a run that came to an end of its own, or was interrupted, ended.

    Args:
        request: what was asked.
        recipe: its last phase.
        state: the last state.
        ending: why it is the last.
        stop: which signal came, if one did.
        metrics: of the last evaluation.
        since_s: ``time.perf_counter()`` when it began; before a resume lies the time of the process before.
    """
    first = lead(state)
    interrupted = ending == "interrupted" and stop.signum is not None
    return Summary(
        state="interrupted" if ending == "interrupted" else "finished",
        exit_code=exit_code_of(stop.signum) if interrupted and stop.signum is not None else 0,
        run=readable(request.directory.path),
        recipe=request.recipe.name,
        data=recipe.data,
        device=str(request.device),
        precision=first.precision,
        epoch=first.epoch,
        steps_attempted=attempted_steps(state),
        steps_applied=first.step,
        steps_skipped=first.attempted_steps - first.step,
        metrics=plain_metrics(metrics),
        best=None if first.best is None else {"metric": recipe.monitor, **attrs.asdict(first.best)},
        seconds=round(time.perf_counter() - since_s, 3),
    )
