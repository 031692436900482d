"""The summary of a run: the last line on stdout, and what status.json says at the end."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from steploop.core.early_stopping import Best
from steploop.core.html_tables import html_table
from steploop.core.state.several import State, members
from steploop.recipe.recipe import Recipe
from steploop.runs.curves_html import curves_html
from steploop.runs.logs.progress_text import counted, duration, format_values
from steploop.runs.members import attempted_steps, epoch_of, lead
from steploop.runs.metric_values import plain_metrics
from steploop.runs.plan import Ending
from steploop.runs.requests import Request
from steploop.runs.resume_command import resume_command
from steploop.runs.signals import StopFlag, exit_code_of
from steploop.runs.text_names import readable

__all__ = ["Summary", "summarize"]


@attrs.frozen(kw_only=True)
class Summary:
    """How a run ended: the last line on stdout.

    Attributes:
        state: finished or interrupted.
        ending: why it ended: finished, early_stop, limit or interrupted.
        exit_code: of the command line.
        run: the run directory.
        epoch: the epoch of the last step, counted from 1; 0 before the first step.
        metrics: of the last evaluation; None for a number that is not finite.
        best: "metric", "value", "step" and "epoch" of the best evaluation; None where nothing is monitored.
        seconds: of training and evaluation, those before a resume included.
        states: of several states, the steps of each by its name.
        resume: the command that goes on with it.
    """

    state: str
    ending: Ending
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
    states: Mapping[str, Mapping[str, int]]
    resume: str = attrs.field()

    @resume.default
    def _plain_resume(self) -> str:
        return resume_command(self.run, restart_epoch=False)

    def __str__(self) -> str:
        """One sentence for a person."""
        how = {"early_stop": "Stopped early", "limit": "Stopped at the limit of steps"}
        said = how.get(self.ending, self.state.capitalize())
        steps = counted(self.steps_attempted, "step")
        where = f"after {counted(self.epoch, 'epoch')}, {steps}"
        text = f"{said} {where if self.ending == 'finished' else f'in epoch {self.epoch}, after {steps}'}"
        if self.steps_skipped:
            text += f" ({self.steps_skipped} skipped)"
        text += f" in {duration(self.seconds)}"
        if self.metrics:
            text += f": {format_values(self.metrics)}"
        if self.best is not None:
            best = self.best
            text += f". Best {format_values({best['metric']: best['value']})} at step {best['step']} (epoch {best['epoch']})"
        return text + "."

    def _repr_html_(self) -> str:
        """What a notebook shows: the sentence, where the run is, and its curves."""
        go_on = f"steploop.run(..., resume={self.run!r})" if self.ending in {"interrupted", "limit"} else None
        rows = {
            "run": self.run, "recipe": self.recipe, "data": self.data, "device": f"{self.device}, {self.precision}",
            "go on with": go_on,
        }  # fmt: skip
        return html_table(str(self), rows, below=curves_html(Path(self.run)))


def best_entry(metric: str | None, best: Best) -> dict[str, Any]:
    """The best evaluation as a summary and status.json have it; the state counts its epochs from 0."""
    return {"metric": metric, "value": best.value, "step": best.step, "epoch": best.epoch + 1}


def summarize(
    request: Request,
    recipe: Recipe,
    state: State,
    *,
    ending: Ending,
    stop: StopFlag,
    metrics: Mapping[str, float | None],
    seconds: float,
) -> Summary:
    """How a run that came to an end of its own, or was interrupted, ended.

    Args:
        request: what was asked.
        recipe: its last phase.
        state: the last state.
        ending: why it is the last.
        stop: which signal came, if one did.
        metrics: of the last evaluation.
        seconds: of all its processes.
    """
    first = lead(state)
    interrupted = ending == "interrupted" and stop.signum is not None
    return Summary(
        state="interrupted" if ending == "interrupted" else "finished",
        ending=ending,
        exit_code=exit_code_of(stop.signum) if interrupted and stop.signum is not None else 0,
        run=readable(request.directory.given),
        recipe=request.recipe.name,
        data=recipe.data,
        device=str(request.device),
        precision=first.precision,
        epoch=epoch_of(state),
        steps_attempted=attempted_steps(state),
        steps_applied=first.step,
        steps_skipped=first.attempted_steps - first.step,
        metrics=plain_metrics(metrics),
        best=None if first.best is None else best_entry(recipe.monitor, first.best),
        seconds=round(seconds, 3),
        states=_counts(state),
        resume=resume_command(
            readable(request.directory.given),
            restart_epoch=not getattr(recipe.batches, "restorable", True)
            and 0 < first.batch < len(recipe.batches),
        ),
    )


def _counts(state: State) -> dict[str, dict[str, int]]:
    """The steps of each of several states; empty where there is one, which the summary itself counts."""
    return {
        name: {
            "attempted": one.attempted_steps,
            "applied": one.step,
            "skipped": one.attempted_steps - one.step,
        }
        for name, one in members(state).items()
        if name
    }
