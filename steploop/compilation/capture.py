"""Trace a train step on fake tensors: the graph, and what the host does around it."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import attrs
import torch
from torch import Tensor

from steploop.compilation.cleanup import restored
from steploop.compilation.flattening import replace_tensors
from steploop.compilation.graph_outputs import collect
from steploop.compilation.inductor import capture, fake_mode
from steploop.compilation.leaves import Place, counted_on_host, places, refuse_overlap, with_tensors
from steploop.compilation.optimizer_calls import TensorScalars
from steploop.compilation.plans import COUNTERS, HostValue, StatePlan, StepPlan
from steploop.compilation.traced_state import Notes, OwnedCount, TracedState, traced_class
from steploop.core.schedules import Schedule
from steploop.core.state.ownership import Lease
from steploop.core.state.train_state import TrainState, read_host
from steploop.core.steps.set_rates import values_at
from steploop.errors import CompileError

__all__ = ["trace_step"]

_SPARE_VALUES = 8  # places for what update_ema(decay=function) asks of the host


class _StepTrace:
    """One run of a train step on fake tensors, and the values that the host computes."""

    def __init__(self, states: Mapping[str, TrainState], *, cycled: bool) -> None:
        self.states = states
        self.cycled = cycled
        self.notes = Notes()
        self.scalars = TensorScalars()
        self.values: list[HostValue] = []
        self.numbers: Tensor | None = None
        self.before: dict[str, list[Schedule]] = {name: [] for name in states}
        self.after: dict[str, list[Schedule]] = {name: [] for name in states}
        self.limits: dict[str, int] = {}
        self.cycles_momentum = False
        self._kept: list[Tensor] = []  # their ids are keys, which must not be used again

    def size(self) -> int:
        """The number of values that the host may write."""
        return _SPARE_VALUES + sum(2 * len(s.hyper) + 1 for s in self.states.values())

    # -- what step functions ask of a trace ------------------------------------------------------------------

    def schedule(self, state: Any, learning_rate: Schedule) -> Any:
        """Leave the schedule to the host: before the graph, or after it if the optimizer has stepped."""
        count: OwnedCount = state.attempted_steps
        # run once here: what it reads of the traced state is noted, and what it raises has the user's line
        step = read_host(self.states[count.owner].applied_steps) + count.offset
        values = values_at(state.machine, learning_rate, step)
        if any(value is not None and value[1] is not None for value in values):
            self.cycles_momentum = True
        (self.after if count.offset else self.before)[count.owner].append(learning_rate)
        return state

    def value_at_step(self, state: Any, function: Callable[[int], float]) -> Tensor:
        """Make a number that the host computes from the steps taken, this one included if taken."""
        count: OwnedCount = state.attempted_steps
        offset = count.offset

        def read(real: TrainState) -> float:
            return float(function(read_host(real.applied_steps) + offset))

        return self._number(HostValue(count.owner, read))

    def limit_nonfinite(self, state: Any, limit: int) -> None:
        """Record the limit; the host counts."""
        self.limits[state.attempted_steps.owner] = limit

    # -- the traced states -----------------------------------------------------------------------------------

    def _number(self, value: HostValue, dtype: torch.dtype = torch.float64) -> Tensor:
        if self.numbers is None or len(self.values) == self.numbers.numel():
            raise CompileError(
                f"asks the host for more than {_SPARE_VALUES} numbers that depend on the step. Use fewer such functions."
            )
        number = self.numbers[len(self.values)].to(dtype)
        self.values.append(value)
        self.scalars.values[id(number)] = float(value.read(self.states[value.owner]))
        self._kept.append(number)
        return number

    def _hyper(self, owner: str) -> tuple[dict[str, Any], ...]:
        """Return the hyperparameters; those that a schedule sets are inputs of the graph."""
        state = self.states[owner]
        dtype = (
            torch.float64
            if any(p.dtype == torch.float64 for p in state.tensors.params.values())
            else torch.float32
        )
        groups = []
        for index, group in enumerate(state.hyper):
            traced = dict(group)
            if group.get("lr") is not None:
                traced["lr"] = self._number(HostValue(owner, _reader(index, "lr")), dtype)
            if self.cycled and "betas" in group:
                traced["betas"] = (
                    self._number(HostValue(owner, _reader(index, "betas")), dtype),
                    *group["betas"][1:],
                )
            elif self.cycled and "momentum" in group:
                traced["momentum"] = self._number(HostValue(owner, _reader(index, "momentum")), dtype)
            own = state.machine.optimizer.param_groups[index]
            if "capturable" in own:
                traced["capturable"] = True  # step counts stay tensors
            if "foreach" in own:
                traced["foreach"] = state.device.type != "cpu"
            if "fused" in own:
                traced["fused"] = False  # fusing is the compiler's work
            groups.append(traced)
        return tuple(groups)

    def traced(
        self, owner: str, tensors: Mapping[Place, Tensor], counters: Mapping[str, Tensor]
    ) -> TracedState:
        """Make the state ``owner`` over these fake tensors."""
        state = self.states[owner]
        scale = state.scale
        if scale is not None:
            factor = (
                self._number(HostValue(owner, _scale), torch.float32)
                if counted_on_host(state)
                else counters["scale"]
            )
            scale = attrs.evolve(scale, scale=factor, growth_tracker=counters["growth_tracker"])
        traced = object.__new__(traced_class(type(state)))
        traced.__dict__.update(state.__dict__)
        traced.__dict__.update(
            tensors=with_tensors(state, tensors),
            flight=type(state.flight)(),
            lease=Lease(),
            generation=0,
            hyper=self._hyper(owner),
            scale=scale,
            attempted_steps=OwnedCount(self, "attempted_steps", owner, self.notes),
            batch=OwnedCount(self, "batch", owner, self.notes),
            applied_steps=counters["applied_steps"],
            nonfinite_steps=counters["nonfinite_steps"],
        )  # fmt: skip
        return traced


def _reader(index: int, key: str) -> Callable[[TrainState], Any]:
    if key == "betas":
        return lambda state: state.hyper[index]["betas"][0]
    return lambda state: state.hyper[index][key]


def _scale(state: TrainState) -> Any:
    return state.scale.scale if state.scale is not None else 1.0


def _fake(like: Tensor) -> Tensor:
    """Make a fake tensor of this shape and layout that shares no memory."""
    fake = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
    return fake.requires_grad_(like.requires_grad)


def trace_step(
    train_step: Callable[[Any, Any], Any],
    states: Mapping[str, TrainState],
    batch: Any,
    tensors: Sequence[Tensor],
    *,
    cycled: bool,
) -> StepPlan:
    """Trace ``train_step`` on fake copies of these states and this batch.

    Args:
        train_step: ``(state, batch) -> state``, or with a mapping of states.
        states: by name; "" is the name of a single one.
        batch: what the step takes.
        tensors: the batch's tensors, as ``flatten`` gives them.
        cycled: whether the momentum is an input of the graph, because a schedule sets it.

    Raises:
        SlotsGrew: the optimizer made slots that the states do not have yet.
        CompileError: the step did what no graph can.
    """
    trace = _StepTrace(states, cycled=cycled)
    mode = fake_mode()
    order = [(owner, place) for owner, state in states.items() for place, _ in places(state)]
    counters = [(owner, counter) for owner in states for counter in COUNTERS]
    device = next(iter(states.values())).device
    with mode:
        fakes = [_fake(t) for t in tensors]
        fakes.append(torch.empty(trace.size(), dtype=torch.float64, device=device))
        for state in states.values():
            fakes += [_fake(t) for _, t in places(state)]
        for owner, counter in counters:
            dtype = torch.float32 if counter == "scale" else torch.int64
            fakes.append(torch.empty((), dtype=dtype, device=states[owner].device))
    plans: dict[str, StatePlan] = {}

    def run(*inputs: Tensor) -> list[Tensor]:
        own = len(tensors)
        trace.numbers = inputs[own]
        held = dict(zip(order, inputs[own + 1 :], strict=False))
        counts = dict(zip(counters, inputs[own + 1 + len(order) :], strict=True))
        came = {owner: {place: t for (name, place), t in held.items() if name == owner} for owner in states}
        traced = {
            owner: trace.traced(
                owner, came[owner], {counter: t for (name, counter), t in counts.items() if name == owner}
            )
            for owner in states
        }
        fake_batch = replace_tensors(batch, inputs[:own])
        result = train_step(traced[""] if "" in traced else dict(traced), fake_batch)
        given: list[Tensor] = []
        for owner, new in _named(result, traced).items():
            plans[owner] = collect(
                states[owner], traced[owner], came[owner], new, given,
                before=trace.before[owner], after=trace.after[owner], limit=trace.limits.get(owner, 0),
            )  # fmt: skip
        return given

    with ExitStack() as stack:
        for state in states.values():
            refuse_overlap(state)
            stack.enter_context(restored(state.machine))
        graph = capture(run, fakes, mode, trace.scalars)
    if trace.cycles_momentum and not cycled:
        return trace_step(train_step, states, batch, tensors, cycled=True)
    return StepPlan(
        graph=graph, mode=mode, batch_tensors=len(tensors), order=tuple(order), counters=tuple(counters), values=tuple(trace.values), size=trace.size(),
        states=plans, reads=trace.notes.reads, cycled=cycled,
    )  # fmt: skip


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
