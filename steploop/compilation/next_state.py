"""Make the next state from the previous one and a compiled graph's outputs."""

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
from torch import Tensor

from steploop.compilation.flattening import Build, Reference, builder, renumbered
from steploop.compilation.leaves import with_tensors
from steploop.compilation.plans import StatePlan
from steploop.core.state.copying import leaf_like
from steploop.core.state.ownership import Lease
from steploop.core.state.parts import InFlight
from steploop.core.state.train_state import TrainState
from steploop.core.steps.set_rates import hyper_at

__all__ = ["SPENDER", "Advance", "counted"]

SPENDER = "a compiled train step"


class Advance:
    """Makes the next state by one plan.

    Args:
        plan: of the state.
        where: for each reference of the plan, the index of its tensor in what the graph gave.
    """

    def __init__(self, plan: StatePlan, where: Sequence[int]) -> None:
        self._plan = plan
        self._after = (
            plan.after if plan.on_host else ()
        )  # else the graph knows the count, and ``schedule`` looks it up
        self._constant = dict(plan.changed)
        self._given = _builders(plan.given, where)
        direct = {n: where[t.index] for n, t in plan.flight.items() if isinstance(t, Reference)}
        self._direct = list(direct.items())
        self._flight = _builders({n: t for n, t in plan.flight.items() if n not in direct}, where)
        self._ended = {
            n: v for n, v in InFlight().ended().__dict__.items() if n not in plan.flight and n != "known"
        }
        self._tensors = [(place, where[reference.index]) for place, reference in plan.tensors.items()]

    def __call__(self, state: TrainState, given: Sequence[Tensor]) -> TrainState:
        """Update counters and loss scale, pass the tensors on; where the host counts, set the rates of the next step."""
        plan = self._plan
        flight = self._flight_of(given)
        fields = state.__dict__ | (
            counted(plan, state, finite=flight["finite"]) if plan.on_host else self._constant
        )
        for name, build in self._given:
            fields[name] = build(given)
        if not plan.on_host:
            if plan.attempts:
                fields["attempted_steps"] = state.attempted_steps + plan.attempts
            if plan.batches:
                fields["batch"] = state.batch + plan.batches
            _count_on_device(state, fields, flight)
        if plan.donated:
            if self._tensors:
                fields["tensors"] = with_tensors(
                    state, {p: given[i] for p, i in self._tensors}, same_params=True
                )
            fields["generation"] = state.lease.hand_on(SPENDER)  # the call tore it before the graph ran
        else:
            fields |= self._copies(state, given)
        fields["flight"] = state.flight.over(state.flight.__dict__ | flight)
        for learning_rate in self._after:
            taken = fields["applied_steps"]
            fields["hyper"] = hyper_at(state.machine, fields["hyper"], learning_rate, taken)
        return state.over(fields)

    def count(self, state: TrainState) -> None:
        """Count a step that was finite, in place: in a state that nobody else has, and that the host counts."""
        state.__dict__.update(counted(self._plan, state, finite=True))

    def results(self, state: TrainState, given: Sequence[Tensor]) -> InFlight:
        """What the step leaves in flight."""
        return state.flight.replace(**self._flight_of(given))

    def _flight_of(self, given: Sequence[Tensor]) -> dict[str, Any]:
        flight = self._ended.copy()
        for name, index in self._direct:
            flight[name] = given[index]
        for name, build in self._flight:
            flight[name] = build(given)
        if self._plan.on_host and self._plan.attempts:
            flight["finite"] = flight["finite"].item()  # already computed, on the CPU: no wait
        return flight

    def _copies(self, state: TrainState, given: Sequence[Tensor]) -> dict[str, Any]:
        """Copy the fields that hold tensors, for a step that keeps the old state."""
        params = state.tensors.params
        tensors = {
            place: leaf_like(params[place[1][0]], given[index]) if place[0] == "params" else given[index]
            for place, index in self._tensors
        }
        return {"tensors": with_tensors(state, tensors), "lease": Lease(), "generation": 0}


def counted(plan: StatePlan, state: TrainState, *, finite: bool) -> dict[str, Any]:
    """The plain values of a state after a step that the host counts, but for its rates."""
    changes: dict[str, Any] = dict(plan.changed)
    if plan.attempts:
        changes["attempted_steps"] = state.attempted_steps + plan.attempts
        if finite:
            changes["applied_steps"] = state.applied_steps + plan.attempts
            changes["nonfinite_steps"] = 0
        else:
            changes["nonfinite_steps"] = state.nonfinite_steps + 1
        if state.scale is not None:
            changes["scale"] = state.scale.updated(finite)
    if plan.batches:
        changes["batch"] = state.batch + plan.batches
    return changes


def _builders(templates: Mapping[str, Any], where: Sequence[int]) -> list[tuple[str, Build]]:
    return [
        (name, builder(renumbered(value, lambda index: Reference(where[index]))))
        for name, value in templates.items()
    ]


def _count_on_device(state: TrainState, fields: dict[str, Any], flight: dict[str, Any]) -> None:
    """Put the graph's counts into the state's fields, without reading them."""
    if isinstance(state.applied_steps, int):
        flight["known"] = (state.applied_steps, state.attempted_steps)
    else:
        flight["known"] = state.flight.known
    if state.scale is not None:
        scale, tracker = fields["scale"]
        fields["scale"] = attrs.evolve(state.scale, scale=scale, growth_tracker=tracker)
