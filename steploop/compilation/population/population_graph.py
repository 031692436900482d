"""Call the compiled graph of a population; this runs at every step and is kept short."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from steploop.compilation.flattening import Build, Reference, flatten
from steploop.compilation.graph_calls import positions
from steploop.compilation.host_numbers import Now
from steploop.compilation.next_state import counted
from steploop.compilation.plans import StatePlan, StepPlan
from steploop.compilation.population.graph_parts import Inputs, Part
from steploop.compilation.population.literals import Literal
from steploop.compilation.population.stacked_state import Population
from steploop.compilation.population.stacked_tensors import parts_of
from steploop.compilation.population.step_results import StepResults
from steploop.compilation.repeated_parts import Run
from steploop.core.state.train_state import TrainState
from steploop.core.steps.set_rates import schedule

__all__ = ["PopulationGraph"]

_SPENDER = "a step of a population"


class PopulationGraph:
    """A compiled graph of a population, for batches of one form.

    Args:
        plans: of each member.
        inputs: of the graph.
        run: the compiled graph.
        literals: the numbers that are inputs.
        which: for each member, which of the values of a literal are its own.
        device: of the members.
    """

    def __init__(  # noqa: PLR0917  (all that a call needs)
        self,
        plans: Sequence[StepPlan],
        inputs: Inputs,
        run: Run,
        literals: Sequence[Literal],
        which: Sequence[int],
        device: torch.device,
    ) -> None:
        first, count = plans[0], len(plans)
        self.run = run
        self._plans = plans
        self._states = [plan.states[""] for plan in plans]
        self._device = device
        self._inputs = inputs
        self._where, self._computed = positions(first)
        self._expressions = [list(positions(plan)[1]) for plan in plans]
        self._numbers = torch.zeros(count * first.size, dtype=torch.float64)
        numbers: Any = self._numbers.numpy()
        self._view = memoryview(numbers)
        self._values = [
            [(member * first.size + i, read) for i, read in enumerate(plan.values)]
            for member, plan in enumerate(plans)
        ]
        rows = [[literal.values[i] for literal in literals] for i in which]
        self._literals = torch.tensor(rows, dtype=torch.float64, device=device).reshape(count, len(literals))
        self._given = sum(1 for i in set(first.graph.outline.wiring.given) if i >= 0)
        self._builds: dict[int, Build] = {}
        self._bound: Any = None
        self._fixed: list[Tensor | None] = []
        self._ended: tuple[str | None, ...] | None = None
        self._going = torch.empty(0)
        finite = self._states[0].flight.get("finite")
        self._finite = self._where[finite.index] if isinstance(finite, Reference) else None

    def __call__(self, population: Population, batch: Sequence[Tensor], numbers: Sequence[Any]) -> Population:
        """Take one step of every member that has not ended."""
        members = list(population.members)
        if self._states[0].before:
            members = [_scheduled(m, s.before) for m, s in zip(members, self._states, strict=True)]
        nows = [Now([member], numbers, _FINITE) for member in members]
        view = self._view
        for values, now in zip(self._values, nows, strict=True):
            for position, read in values:
                view[position] = read(now)
        if self._bound is not population.tensors:
            self._bind(population)
        drawn = self._drawn(members)
        inputs = [
            self._input(population, members, batch, drawn, part, dim) if fixed is None else fixed
            for fixed, (part, dim) in zip(self._fixed, self._inputs.taken, strict=True)
        ]
        inputs += [self._literals, self._goes_on(population.ended)]
        passed = [
            _whole(self._input(population, members, batch, drawn, part, dim), dim, len(members))
            for part, dim in self._inputs.passed
        ]
        if self._states[0].donated:
            population.lease.tear()
            for (
                member
            ) in population.members:  # whoever holds a view of one must not read the next step's values in it
                member.lease.tear()
        given = [*self.run(inputs)[: self._given], *passed]
        return self._next(population, members, nows, given)

    # -- inputs --------------------------------------------------------------------------------------------------------

    def _bind(self, population: Population) -> None:
        """Put the tensors of the members into the list of inputs, for as long as these are the population's."""
        tensors: Any = population.tensors
        self._fixed = [
            tensors[part[1]] if part[0] == "place" and part[1] in tensors else None
            for part, _ in self._inputs.taken
        ]
        self._bound = tensors

    def _goes_on(self, ended: tuple[str | None, ...]) -> Tensor:
        if ended is not self._ended and ended != self._ended:
            self._going = torch.tensor([why is None for why in ended], device=self._device)
        self._ended = ended
        return self._going

    def _drawn(self, members: Sequence[TrainState]) -> list[Tensor]:
        """What every member draws, stacked."""
        if not self._plans[0].graph.drawn:
            return []
        each = [plan.graph.draws.run({"": m}) for plan, m in zip(self._plans, members, strict=True)]
        return [torch.stack(tensors) for tensors in zip(*each, strict=True)]

    def _input(  # noqa: PLR0911, PLR0917  (one return for each kind)
        self,
        population: Population,
        members: Sequence[TrainState],
        batch: Sequence[Tensor],
        drawn: Sequence[Tensor],
        part: Part,
        dim: int | None,
    ) -> Tensor:
        kind = part[0]
        if kind == "batch":
            return batch[part[1]]
        if kind == "numbers":
            return self._numbers.to(self._device, copy=True).reshape(len(members), -1)
        if kind == "place":
            return population.tensors[part[1]]  # type: ignore[index]  # it is stacked
        if kind == "draw":
            return drawn[part[1]]
        if kind == "constant":
            constants = [plan.graph.constants[part[1]] for plan in self._plans]
            return constants[0] if dim is None else torch.stack(constants)
        if kind == "result":
            found = [
                flatten(getattr(population.member(i).flight, part[1]))[0] for i in range(len(population))
            ]
            return torch.stack([tensors[part[2]] for tensors in found])
        return torch.tensor([_counter(m, part[1]) for m in members], device=self._device)

    # -- what comes after ------------------------------------------------------------------------------------------------

    def _next(
        self, population: Population, members: Sequence[TrainState], nows: Sequence[Now], given: list[Tensor]
    ) -> Population:
        """The population after the step."""
        first, before = self._states[0], population.ended
        going = [why is None for why in before]
        finite = [True] * len(members) if self._finite is None else given[self._finite].tolist()
        computed: list[list[Any]] = [[] for _ in members]
        if self._computed:
            for now, taken, own, expressions in zip(nows, finite, computed, self._expressions, strict=True):
                now.finite = [taken]
                own += [read(now) for read in expressions]
        rates: dict[Any, Any] = {}
        if first.donated:
            members = [m.replace(generation=m.lease.hand_on(_SPENDER)) for m in members]
        new = [
            _advanced(member, plan, rates, taken=taken) if goes_on else member
            for member, plan, taken, goes_on in zip(members, self._states, finite, going, strict=True)
        ]
        ended = before
        if first.limit and not all(finite):
            ended = tuple(
                why
                or (
                    f"{m.nonfinite_steps} steps in a row were not finite"
                    if plan.limit <= m.nonfinite_steps
                    else None
                )
                for why, m, plan in zip(before, new, self._states, strict=True)
            )
        tensors = population.tensors
        if first.tensors:
            fresh = {place: given[self._where[ref.index]] for place, ref in first.tensors.items()}
            if not all(going):
                fresh = {place: _selected(going, t, tensors[place]) for place, t in fresh.items()}  # type: ignore[index]
            tensors = {**tensors, **fresh}  # type: ignore[dict-item]
            new = list(parts_of(new, fresh, only=True))
        kept = {i: population.results_of(i) for i, goes_on in enumerate(going) if not goes_on}
        results = StepResults(self._states, self._where, given, computed, kept, builds=self._builds)
        if not first.donated:
            return Population(new, tensors, results=results, ended=ended)
        population.lease.hand_on(_SPENDER)
        return Population(new, tensors, results=results, ended=ended, lease=population.lease)


_FINITE = [True]  # what is assumed of a step before it is taken


def _scheduled(state: TrainState, schedules: Sequence[Any]) -> TrainState:
    for one in schedules:
        state = schedule(state, one)
    return state


def _whole(tensor: Tensor, dim: int | None, count: int) -> Tensor:
    """A tensor with an axis of members."""
    return tensor if dim == 0 else tensor.expand(count, *tensor.shape)


def _advanced(state: TrainState, plan: StatePlan, rates: dict[Any, Any], *, taken: bool) -> TrainState:
    """The plain values of a member after its step, and its next rates.

    Args:
        state: before the step.
        plan: of the step.
        rates: what schedules gave for members before this one in the population, which may be alike.
        taken: whether the step was finite.
    """
    changes = counted(plan, state, finite=taken)
    if not plan.after:
        return state.replace(**changes)
    step, machine = changes.get("applied_steps", state.applied_steps), state.machine
    key = (id(plan.after), step, id(state.hyper), machine.rate_factors, machine.group_labels)
    hyper = rates.get(key)
    if hyper is None:
        new = _scheduled(state.replace(**changes), plan.after)
        rates[key] = new.hyper
        return new
    return state.replace(**changes, hyper=hyper)


def _counter(state: TrainState, name: str) -> Any:
    if name in {"applied_steps", "nonfinite_steps"}:
        return int(getattr(state, name))
    if state.scale is None:
        return 0.0 if name == "scale" else 0
    value = getattr(state.scale, name)
    return float(value) if name == "scale" else int(value)


def _selected(going: Sequence[bool], new: Tensor, old: Tensor) -> Tensor:
    """The new values of members that go on, and the old ones of the others."""
    mask = torch.tensor(going, device=new.device).reshape(-1, *[1] * (new.dim() - 1))
    return torch.where(mask, new, old)
