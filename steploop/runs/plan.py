"""Options of a run that change no step, and the protocols of what the loop reports to."""

from collections.abc import Mapping
from typing import Any, Literal, Protocol

import attrs

from steploop.core.state.several import State
from steploop.core.validators import integer
from steploop.runs.capsules.capsule_writer import Skipped

__all__ = ["Ending", "Journal", "Keeper", "Plan", "Witness", "lines_every"]

Ending = Literal["finished", "early_stop", "limit", "interrupted"]
_MOST_STEPS_BETWEEN_LINES = 50
_LINES_PER_EPOCH = 10
_STEPS = attrs.validators.optional(integer(at_least=1, hint="It counts steps; leave it out for the default."))


class Journal(Protocol):
    """Gets what happens, to log it."""

    def train(self, line: Mapping[str, Any]) -> None:
        """A log point: the numbers of one step."""

    def evaluation(self, line: Mapping[str, Any]) -> None:
        """An evaluation: its metrics."""

    def event(self, line: Mapping[str, Any]) -> None:
        """Anything else that a reader of the run will ask about."""


class Witness(Protocol):
    """Who looks at steps that were skipped, and keeps them to be replayed."""

    def after_step(self, before: State, after: State, batch: Any, *, wait: bool = False) -> Skipped | None:
        """Look at a step; with ``wait`` the device may be asked."""


class Keeper(Protocol):
    """Who keeps checkpoints."""

    def save(self, state: State, *, best: bool) -> None:
        """Keep the state; ``best`` where its monitored metric is the best so far."""


@attrs.frozen(kw_only=True)
class Plan:
    """How a run is to be watched and cut off; none of it changes a step.

    Attributes:
        log_every: steps between two lines; None: ten lines an epoch, and at least one in 50 steps.
        checkpoint_every: steps between two checkpoints besides those after each epoch; None: no others.
        limit_steps: attempted steps after which to stop, for a quick look; None: train to the end.
        layer_norms: log the gradient norm of each layer group, named by so many parts of the parameters' names; None:
            no norms, and no cost.
    """

    log_every: int | None = attrs.field(default=None, validator=_STEPS)
    checkpoint_every: int | None = attrs.field(default=None, validator=_STEPS)
    limit_steps: int | None = attrs.field(default=None, validator=_STEPS)
    layer_norms: int | None = attrs.field(
        default=None,
        validator=attrs.validators.optional(integer(at_least=1, hint="1 groups by the outermost modules.")),
    )


def lines_every(plan: Plan, steps_per_epoch: int) -> int:
    """Steps between two lines: as planned, or ten lines an epoch and at least one in 50 steps."""
    return plan.log_every or max(1, min(_MOST_STEPS_BETWEEN_LINES, steps_per_epoch // _LINES_PER_EPOCH))
