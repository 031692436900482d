"""The members of a population as its steps count them on: plain values, changed in place, in objects that nobody else has."""

from collections.abc import Sequence
from typing import Any

from steploop.compilation.host_numbers import Now
from steploop.compilation.next_state import counted
from steploop.compilation.plans import StatePlan
from steploop.core.state.ownership import Lease
from steploop.core.state.train_state import TrainState
from steploop.core.steps.set_rates import Schedules, schedule

__all__ = ["RunningMembers"]


class RunningMembers:
    """The members' values, without results.

    A state is a value, and making one for each member is most of a small step's time. So the steps of a population change
    these, and whoever looks at a member is given a state of its own.

    Args:
        members: whose values are taken over.

    Attributes:
        states: of each member; for reading, until the next step.
        nows: what the host knows of each.
    """

    def __init__(self, members: Sequence[TrainState]) -> None:
        self._lease = Lease()  # nobody spends it
        self.states = [m.replace(lease=self._lease, generation=0) for m in members]
        self.nows = [Now([state], (), ()) for state in self.states]

    def copy(self) -> "RunningMembers":
        """The same values in other objects."""
        return RunningMembers(self.states)

    def view(self, index: int) -> TrainState:
        """A member as a state that whoever asked may keep."""
        return self.states[index].replace(lease=Lease(), generation=0)

    def set_rates(self, schedules: Sequence[Sequence[Schedules]]) -> None:
        """Set the rates of this step.

        Args:
            schedules: of each member; or none.
        """
        for state, own in zip(self.states, schedules, strict=False):
            state.__dict__["hyper"] = _scheduled(state, own).hyper

    def advance(self, plans: Sequence[StatePlan], finite: Sequence[bool], going: Sequence[bool]) -> None:
        """Count a step, and set the rates of the next one.

        Args:
            plans: of each member.
            finite: whether its step was.
            going: whether it took one.
        """
        rates: dict[Any, Any] = {}  # what schedules gave for members before, which may be alike
        for state, plan, taken, goes_on in zip(self.states, plans, finite, going, strict=True):
            if not goes_on:
                continue
            fields = state.__dict__
            if taken and state.scale is None and not plan.changed:  # the usual one, at every step
                fields["attempted_steps"] += plan.attempts
                fields["batch"] += plan.batches
                if plan.attempts:
                    fields["applied_steps"] += plan.attempts
                    fields["nonfinite_steps"] = 0
            else:
                fields |= counted(plan, state, finite=taken)
            if plan.after:
                machine = state.machine
                key = (
                    id(plan.after),
                    state.applied_steps,
                    id(state.hyper),
                    machine.rate_factors,
                    machine.group_labels,
                )
                if key not in rates:  # with the old ones, alive, so that nothing else gets their identity
                    rates[key] = state.hyper, _scheduled(state, plan.after).hyper
                fields["hyper"] = rates[key][1]


def _scheduled(state: TrainState, schedules: Sequence[Schedules]) -> TrainState:
    for one in schedules:
        state = schedule(state, one)
    return state
