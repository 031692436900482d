"""The result of a trace: the graph, the order of its inputs, how to make the next states."""

from collections.abc import Mapping
from typing import Any

import attrs

from steploop.compilation.aten_graph import CapturedGraph
from steploop.compilation.flattening import Reference
from steploop.compilation.host_numbers import Expression, Guard
from steploop.compilation.leaves import Place
from steploop.core.steps.set_rates import Schedules

__all__ = ["COUNTERS", "StatePlan", "StepPlan"]

# the counters of a state, as tensors: for a state on a device, and for a step that computes with them
COUNTERS = ("applied_steps", "nonfinite_steps", "scale", "growth_tracker")


@attrs.frozen(kw_only=True)
class StatePlan:
    """How to make the next state from the previous one and the graph's outputs.

    Attributes:
        donated: whether the tensors are updated in place; if not, ``tensors`` has all of them.
        on_host: whether the host counts the steps and keeps the loss scale; on a device the graph does.
        attempts: optimizer steps tried in one train step.
        batches: how far the cursor moves.
        given: field -> template of what the graph gives for it: counters on a device.
        flight: field in flight -> template of what the graph gives for it.
        tensors: place -> what the graph gives for it, where the step does not donate.
        before: schedules that set the rates before the graph runs.
        after: schedules that set those of the next step.
        changed: plain fields that the step gave another value.
        limit: steps in a row that may be not finite.
    """

    donated: bool
    on_host: bool
    attempts: int
    batches: int
    given: Mapping[str, Any]
    flight: Mapping[str, Any]
    tensors: Mapping[Place, Reference]
    before: tuple[Schedules, ...]
    after: tuple[Schedules, ...]
    changed: Mapping[str, Any]
    limit: int


@attrs.frozen(kw_only=True)
class StepPlan:
    """A traced train step.

    Attributes:
        graph: takes the tensors of the batch, the input of numbers, the tensors at ``order``, the counters at
            ``counters``, those of ``results``, its own constants, and what is drawn for it.
        mode: the fake mode that it was traced in.
        batch_tensors: how many tensors the batch has.
        order: (state, place) of each tensor input.
        counters: (state, counter) of each counter input.
        results: (state, field, which tensor) of each input that the step before has left.
        values: the numbers, in their order.
        size: length of the input of numbers.
        states: state name -> plan.
        computed: index among what references point at -> the number of the host's that stands there.
        left: what the step leaves in attributes: (dictionary, key, template).
        guards: what Python decided: the graph holds while it decides the same.
        cycled: whether a schedule sets the momentum.
        reads_results: whether the step reads what the step before has left.
    """

    graph: CapturedGraph
    mode: Any
    batch_tensors: int
    order: tuple[tuple[str, Place], ...]
    counters: tuple[tuple[str, str], ...]
    results: tuple[tuple[str, str, int], ...]
    values: tuple[Expression, ...]
    size: int
    states: Mapping[str, StatePlan]
    computed: Mapping[int, Expression]
    left: tuple[tuple[Any, Any, Any], ...]
    guards: tuple[Guard, ...]
    cycled: bool
    reads_results: bool
