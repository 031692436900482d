"""Trace a train step on fake tensors: the graph, and what the host does around it."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from steploop.compilation.aten_graph import capture, fake_mode
from steploop.compilation.baked import Baked
from steploop.compilation.cleanup import restored
from steploop.compilation.constants import Untouched
from steploop.compilation.flattening import Flat, flatten, rebuild
from steploop.compilation.graph_outputs import collect, template
from steploop.compilation.host_numbers import HostNumber
from steploop.compilation.leaves import places, refuse_overlap
from steploop.compilation.plans import COUNTERS, StatePlan, StepPlan
from steploop.compilation.step_trace import StepTrace
from steploop.compilation.traced_state import TracedState, results_of
from steploop.core.state.train_state import TrainState
from steploop.errors import CompileError

__all__ = ["trace_step"]


def _fake(like: Tensor) -> Tensor:
    """Make a fake tensor of this shape and layout that shares no memory."""
    fake = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
    return fake.requires_grad_(like.requires_grad)


def _results(states: Mapping[str, TrainState]) -> dict[tuple[str, str], Flat]:
    """What the step before has left in the states, flat; without what no graph takes."""
    found = {}
    for owner, state in states.items():
        for field in results_of(state.flight):
            try:
                found[owner, field] = flatten(getattr(state.flight, field))
            except CompileError:  # refused if the step reads it
                continue
    return found


def trace_step(
    train_step: Callable[[Any, Any], Any],
    states: Mapping[str, TrainState],
    batch: Any,
    flat: Flat,
    baked: Baked,
    *,
    cycled: bool = False,
    fixed: bool = False,
    drawn_outside: bool = False,
) -> StepPlan:
    """Trace ``train_step`` on fake copies of these states and this batch.

    Args:
        train_step: ``(state, batch) -> state``, or with a mapping of states.
        states: by name; "" is the name of a single one.
        batch: what the step takes.
        flat: the batch as ``flatten`` gives it.
        baked: the plain values that Python may read besides states and batch; put back as they were.
        cycled: whether the momentum is an input of the graph, because a schedule sets it.
        fixed: whether the numbers of the batch are built in.
        drawn_outside: whether all random numbers are inputs of the graph.

    Raises:
        SlotsGrew: the optimizer made slots that the states do not have yet.
        CompileError: the step did what no graph can.
    """
    trace = StepTrace(states, flat[2], cycled=cycled, fixed=fixed)
    mode = fake_mode()
    tensors = flat[0]
    order = [(owner, place) for owner, state in states.items() for place, _ in places(state)]
    counters = [(owner, counter) for owner in states for counter in COUNTERS]
    earlier = _results(states)
    results = [(*key, i) for key, found in earlier.items() for i in range(len(found[0]))]
    device = next(iter(states.values())).device
    with mode:
        fakes = [_fake(t) for t in tensors]
        fakes.append(torch.empty(trace.size(), dtype=torch.float64, device=device))
        for state in states.values():
            fakes += [_fake(t) for _, t in places(state)]
        for owner, counter in counters:
            dtype = torch.float32 if counter == "scale" else torch.int64
            fakes.append(torch.empty((), dtype=dtype, device=states[owner].device))
        fakes += [_fake(t.detach()) for found in earlier.values() for t in found[0]]
    plans: dict[str, StatePlan] = {}
    computed: dict[int, Any] = {}
    left: list[tuple[Any, Any, Any]] = []

    def run(*inputs: Tensor) -> list[Tensor]:
        rest = iter(inputs)
        given_batch = [next(rest) for _ in tensors]
        trace.vector = next(rest)
        held = {key: next(rest) for key in order}
        counts = {key: next(rest) for key in counters}
        came_before = {key: [next(rest) for _ in found[0]] for key, found in earlier.items()}
        came = {owner: {place: t for (name, place), t in held.items() if name == owner} for owner in states}
        traced = {
            owner: trace.traced(
                trace.owners[owner],
                came[owner],
                {counter: t for (name, counter), t in counts.items() if name == owner},
                {field: found for (name, field), found in came_before.items() if name == owner},
            )
            for owner in states
        }
        fake_batch = rebuild(batch, given_batch, trace.batch_numbers(len(flat[2])))
        result = train_step(traced[""] if "" in traced else dict(traced), fake_batch)
        given: list[Any] = []
        for owner, new in _named(result, traced).items():
            _refuse_frozen(states[owner], came[owner], new)
            plans[owner] = collect(
                states[owner], traced[owner], came[owner], new, given,
                before=trace.before[owner], after=trace.after[owner], limit=trace.limits.get(owner, 0),
            )  # fmt: skip
        left.extend((where, key, template(value, given)) for where, key, value in baked.tensors_left())
        for index, value in enumerate(given):
            if issubclass(type(value), HostNumber):
                computed[index] = value.read
        return [t for t in given if isinstance(t, Tensor)]

    with ExitStack() as stack:
        for state in states.values():
            refuse_overlap(state)
            _refuse_extra_state(state)
            stack.enter_context(restored(state.machine))
        stack.callback(trace.close)
        stack.callback(baked.put_back)
        stack.enter_context(trace.events.watching())
        untouched = Untouched(trace.note_value)
        stack.callback(untouched.put_back)
        graph = capture(
            run, fakes, mode, (trace.scalars, untouched), trace.events.all, drawn_outside=drawn_outside
        )
        baked.check(graph.constants)
    if trace.cycles_momentum and not cycled:
        return trace_step(
            train_step, states, batch, flat, baked, cycled=True, fixed=fixed, drawn_outside=drawn_outside
        )
    return StepPlan(
        graph=graph, mode=mode, batch_tensors=len(tensors), order=tuple(order), counters=tuple(counters), results=tuple(results),
        values=tuple(trace.values), size=trace.size(), states=plans, computed=computed, left=tuple(left),
        guards=tuple(trace.guards), cycled=cycled, reads_results=bool(trace.results_read),
    )  # fmt: skip


def _refuse_extra_state(state: TrainState) -> None:
    for name, module in state.machine.module.extras:
        raise CompileError(
            f"trains {name or 'a model'} ({type(module).__name__}), which keeps an extra state in Python (get_extra_state) that no "
            "graph changes. Keep it in a buffer (register_buffer), or run this step in eager."
        )


def _refuse_frozen(state: TrainState, came: Mapping[Any, Tensor], new: TrainState) -> None:
    """Raise CompileError if the step has frozen or thawed a parameter: the graph does it once, and not to the state's."""
    for name, param in state.tensors.params.items():
        found = (came["params", (name,)], new.tensors.params[name])
        if any(tensor.requires_grad is not param.requires_grad for tensor in found):
            raise CompileError(
                f"changes requires_grad of {name} in Python, which a graph would do once. Freeze it between two steps: it is looked at "
                "before each one."
            )


def _named(result: Any, traced: Mapping[str, TracedState]) -> dict[str, TracedState]:
    """Return the states that a train step returned, by name."""
    found = {"": result} if "" in traced else result
    if (
        not isinstance(found, Mapping)
        or list(found) != list(traced)
        or not all(isinstance(s, TracedState) for s in found.values())
    ):
        expected = "a TrainState" if "" in traced else f"a mapping of the states {list(traced)}"
        raise CompileError(
            f"must return {expected}, made from what it was given, but returned {type(result).__name__}."
        )
    return dict(found)
