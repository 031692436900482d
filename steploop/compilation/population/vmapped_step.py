"""``steploop.vmap``: step a population as one compiled graph."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import attrs

from steploop.compilation.aten_graph import check_torch
from steploop.compilation.baked import Baked
from steploop.compilation.flattening import Flat, describe, flatten, rebuild
from steploop.compilation.graph_outputs import SlotsGrew
from steploop.compilation.inductor import compile_graph
from steploop.compilation.population.batching import batched
from steploop.compilation.population.graph_parts import Inputs
from steploop.compilation.population.member_traces import (
    MemberTrace,
    MemberTraces,
    TrainStep,
    differences,
    holds,
)
from steploop.compilation.population.population_graph import PopulationGraph
from steploop.compilation.population.stacked_state import Population, stack_members
from steploop.compilation.repeated_parts import Run
from steploop.core.state.surroundings import is_usual, shield
from steploop.core.state.train_state import TrainState
from steploop.errors import CompileError, ConfigError, NonFiniteError

__all__ = ["VmappedStep", "vmap"]

_WORTH_A_GRAPH = 3  # another form of batch than the first is compiled when it comes for this time


@attrs.define(eq=False)
class _Current:
    """What ran last for one form of batch.

    Attributes:
        graph: the compiled one.
        traces: of each member.
        result: the ``values`` of what it gave: whose members need not be compared again.
        guarded: members of which Python decides by numbers.
    """

    graph: PopulationGraph
    traces: Sequence[MemberTrace]
    result: object = None
    guarded: Sequence[tuple[int, MemberTrace]] = ()


class VmappedStep:
    """The result of ``steploop.vmap(train_step)``: takes a population and a batch, and gives the next population.

    Attributes:
        compile_s: seconds that tracing and compiling took, for each graph.
    """

    def __init__(
        self,
        train_steps: TrainStep | Sequence[TrainStep],
        in_dims: Any,
        report: Callable[[str], None] | None,
    ) -> None:
        self.compile_s: list[float] = []
        self._steps = train_steps
        self._in_dims = in_dims
        self._report = report or (lambda _: None)
        self._traces = MemberTraces()
        self._current: dict[Any, _Current] = {}
        self._compiled: dict[str, Run] = {}
        self._seen: dict[Any, int] = {}
        self._watched: list[Baked] = []

    def __call__(self, population: Population, batch: Any) -> Population:
        """Take one step of every member.

        Raises:
            CompileError: the members' steps cannot be one graph.
            SpentStateError: the population was given away.
            NonFiniteError: the last member has ended by steps that were not finite.
        """
        if not isinstance(population, Population):
            raise CompileError(
                f"steploop.vmap: expected a population, but got a {type(population).__name__}. Make one: steploop.stack(states)."
            )
        population.check_alive("a step")
        if all(population.ended):
            return population
        new = self.by_graph(population, batch)
        if new is None:
            with _shielded(population):
                return self._one_by_one(population, batch, flatten(batch))
        if new.ended != population.ended and not any(
            why is None or why == "early stopping" for why in new.ended
        ):
            raise NonFiniteError(
                f"The last member of the population has ended: {', '.join(f'{i}: {why}' for i, why in enumerate(new.ended))}. Lower the "
                "learning rate, clip, or look for a division or logarithm of 0 in the loss."
            )
        return new

    def by_graph(self, population: Population, batch: Any) -> Population | None:
        """Take one step by the compiled graph; None, and nothing is done, where the members step one by one.

        Unlike a call, it raises nothing where the last member has ended.
        """
        with _shielded(population):
            tensors, key, numbers = flat = flatten(batch)
            current = self._current.get(key)
            if current is None or not self._holds(current, population, numbers):
                current = self._find(population, batch, flat)
                if current is None:
                    return None
            new = current.graph(population, tensors, numbers)
            current.result = new.values
            return new

    # -- finding or making a graph -----------------------------------------------------------------------------------

    def _holds(self, current: _Current, population: Population, numbers: Sequence[Any]) -> bool:
        """Whether the graph that ran last for this form of batch may run again."""
        if current.result is not population.values:
            return False
        for baked in self._watched:
            if not baked.unchanged():
                return False
        return all(holds(trace, population.member(i), numbers) for i, trace in current.guarded)

    def _find(self, population: Population, batch: Any, flat: Flat) -> _Current | None:
        """Find or make the graph; None where the members step one by one."""
        if population.tensors is None or any(
            not any(m.tensors.slots.values()) and m.step == 0 for m in population.running.states
        ):
            return None  # the optimizers have not made their slots
        key = flat[1]
        if key not in self._current and self._current:
            self._seen[key] = self._seen.get(key, 0) + 1
            if self._seen[key] < _WORTH_A_GRAPH:
                return None
        check_torch()
        states = [population.member(i) for i in range(len(population))]
        steps = self._steps_of(len(states))
        dims = self._dims(batch, flat)
        batches = [_of_member(batch, flat, dims, i) for i in range(len(states))]
        begin = time.perf_counter()
        try:
            traces = self._traces.of(steps, states, batches, [flatten(one) for one in batches])
        except SlotsGrew:
            return None
        self._watch(steps, states)
        current = self._current.get(key)
        if current is not None and all(a is b for a, b in zip(current.traces, traces, strict=True)):
            return current
        self._report(f"compiling the step of {len(states)} members for a batch of {describe(key)}")
        graph = self._graph(traces, states, dims)
        self.compile_s.append(time.perf_counter() - begin)
        self._report(f"compiling: {self.compile_s[-1]:.0f} s")
        guarded = [(i, trace) for i, trace in enumerate(traces) if trace.guards]
        self._current[key] = _Current(graph, traces, guarded=guarded)
        return self._current[key]

    def _graph(
        self, traces: Sequence[MemberTrace], states: Sequence[TrainState], dims: Sequence[int | None]
    ) -> PopulationGraph:
        literals, which = differences(traces, states)
        plans = [trace.plan for trace in traces]
        inputs = Inputs(plans, dims)
        for part in inputs.written:
            if part[0] != "place":
                what = "of the batch" if part[0] == "batch" else "that is none of the state's"
                raise CompileError(
                    f"This train step cannot be a population's: it changes a tensor {what} in place, which is one for all members. "
                    "Work on a copy, or keep it in the state (a buffer, state.carry)."
                )
        first = plans[0]
        graph = batched(first.graph, first.mode, literals, [dim for _, dim in inputs.taken], len(plans))
        run = self._compiled.get(graph.outline.text)
        if run is None:
            run = self._compiled[graph.outline.text] = compile_graph(graph, first.mode)
        return PopulationGraph(plans, inputs, run, literals, which, states[0].device)

    def _watch(self, steps: Sequence[TrainStep], states: Sequence[TrainState]) -> None:
        """Guard what Python reads besides: all models of a function at once, which is looked through at every step."""
        models: dict[int, dict[int, Any]] = {}
        for step, state in zip(steps, states, strict=True):
            models.setdefault(id(step), {})[id(state.machine.model)] = state.machine.model
        functions = {id(step): step for step in steps}
        self._watched = [Baked(step, list(models[key].values())) for key, step in functions.items()]

    def _steps_of(self, count: int) -> list[TrainStep]:
        if callable(self._steps):
            return [self._steps] * count
        if len(self._steps) != count:
            raise ConfigError(
                f"steploop.vmap: was given {len(self._steps)} train steps, but the population has {count} members."
            )
        return list(self._steps)

    # -- batches -------------------------------------------------------------------------------------------------------

    def _dims(self, batch: Any, flat: Flat) -> list[int | None]:
        """For each tensor of the batch, 0 or None."""
        if self._in_dims is None or self._in_dims == 0:
            return [self._in_dims] * len(flat[0])
        found: list[int | None] = []
        _walk_dims(self._in_dims, batch, found)
        return found

    def _one_by_one(self, population: Population, batch: Any, flat: Flat) -> Population:
        """Take the step of every member in eager."""
        dims = self._dims(batch, flat)
        steps = self._steps_of(len(population))
        states = [population.member(i) for i in range(len(population))]
        population.lease.tear()
        new = []
        for i, (step, state) in enumerate(zip(steps, states, strict=True)):
            new.append(state if population.ended[i] else step(state, _of_member(batch, flat, dims, i)))
        population.lease.hand_on("a step of a population")
        return stack_members(new, population.ended)


def _shielded(population: Population) -> AbstractContextManager[Any]:
    """Keep out what surrounds a step, where that is not as usual."""
    machine = population.running.states[0].machine
    return nullcontext() if is_usual(machine) else shield(machine)


def _walk_dims(dims: Any, tree: Any, found: list[int | None]) -> None:
    """Append 0 or None for each tensor of a tree, in the order of ``flatten``; dims may stop above the leaves."""
    if isinstance(dims, dict):
        for key, value in tree.items():
            _walk_dims(dims[key], value, found)
    elif isinstance(dims, (list, tuple)):
        for one, value in zip(dims, tree, strict=True):
            _walk_dims(one, value, found)
    else:
        found += [dims] * len(flatten(tree)[0])


def _of_member(batch: Any, flat: Flat, dims: Sequence[int | None], index: int) -> Any:
    """The batch that one member sees."""
    if not any(dim == 0 for dim in dims):
        return batch
    return rebuild(
        batch, [t if dim is None else t[index] for t, dim in zip(flat[0], dims, strict=True)], flat[2]
    )


def vmap(
    train_step: TrainStep | Sequence[TrainStep],
    *,
    in_dims: Any = None,
    report: Callable[[str], None] | None = None,
) -> VmappedStep:
    """Step a population of states of one shape as one compiled graph.

    Each member has its own values, rates, other hyperparameters, schedule, clipping by its own norm, loss scale, skips,
    counters and draws, which are exactly those of its single run. After 20 steps in float32 its parameters are within 1e-6
    of that run's; they are not equal to the bit. The first step, which makes the optimizers' slots, and batches of another
    form than the first until they have come three times, are stepped one by one, in eager.

    Members may differ in their values and in numbers of Python's: learning rate, weight decay, betas, dropout rate, the
    bounds of a clipping. What makes another graph is refused with its name: other shapes, another optimizer, ``nesterov``
    in one and not in the other, a branch that Python takes for one only; and so are calls for which ``torch.vmap`` has no
    rule, reading a tensor, and changing the batch in place.

    A member ends, and stays as it is while the others go on, when its ``early_stopping`` says so, or when as many of its
    steps in a row were not finite as ``optimizer_step`` allows; ``population.ended`` says why.

    Args:
        train_step: ``(state, batch) -> state``; or a list of them, one for each member, where closures differ.
        in_dims: which tensors of a batch are the members' own, stacked along their first axis: None (the batch is shared),
            0 (all of them), or a tuple or dict of the batch's structure with None and 0 in it.
        report: is called with what happens, in short sentences.

    Returns:
        A callable ``(population, batch) -> population``. Tracing and compiling take longer than for a single step; a
        trace is made for members that are alike.

    Raises:
        ConfigError: a train step cannot be called.

    Example:
        >>> population = steploop.stack([state, state.clone()])
        >>> step = steploop.vmap(train_step)
        >>> population = reduce(step, [batch], population)  # the first step is no graph yet
        >>> [state.step for state in steploop.unstack(population)]
        [1, 1]
    """
    steps = [train_step] if callable(train_step) else list(train_step)
    for one in steps:
        if not callable(one):
            raise ConfigError(f"vmap: expected a train step, (state, batch) -> state, but got {one!r}.")
    return VmappedStep(train_step if callable(train_step) else steps, in_dims, report)
