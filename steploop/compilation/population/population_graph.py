"""Call the compiled graph of a population; this runs at every step and is kept short."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from steploop.compilation.flattening import Reference, flatten
from steploop.compilation.graph_calls import positions
from steploop.compilation.plans import StepPlan
from steploop.compilation.population.graph_parts import Inputs, Part
from steploop.compilation.population.literals import Literal
from steploop.compilation.population.running_members import RunningMembers
from steploop.compilation.population.stacked_state import Population
from steploop.compilation.population.stacked_tensors import parts_of
from steploop.compilation.population.step_results import Form, StepResults
from steploop.compilation.repeated_parts import Run
from steploop.core.state.train_state import TrainState

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
        self._befores = [state.before for state in self._states] if self._states[0].before else []
        self._forms: dict[int, Form] = {}
        self._bound: Any = None
        self._fixed: list[Tensor | None] = []
        self._ended: tuple[str | None, ...] | None = None
        self._going = torch.empty(0)
        finite = self._states[0].flight.get("finite")
        self._finite = self._where[finite.index] if isinstance(finite, Reference) else None

    def __call__(self, population: Population, batch: Sequence[Tensor], numbers: Sequence[Any]) -> Population:
        """Take one step of every member that has not ended."""
        running = population.running
        if not self._states[0].donated:
            running = running.copy()  # the population that goes in stays as it is
        running.set_rates(self._befores)
        members = running.states
        view = self._view
        for values, now in zip(self._values, running.nows, strict=True):
            now.numbers, now.finite = numbers, _FINITE  # assumed, before it is taken
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
        kept = {i: population.results_of(i) for i, why in enumerate(population.ended) if why is not None}
        if self._states[0].donated:
            population.tear()
        given = [*self.run(inputs)[: self._given], *passed]
        return self._next(population, running, given, kept)

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
        self,
        population: Population,
        running: RunningMembers,
        given: list[Tensor],
        kept: dict[int, dict[str, Any]],
    ) -> Population:
        """The population after the step."""
        first, before, count = self._states[0], population.ended, len(population)
        going = [why is None for why in before]
        finite = [True] * count if self._finite is None else given[self._finite].tolist()
        computed: list[list[Any]] = [[] for _ in going]
        if self._computed:
            for now, taken, own, expressions in zip(
                running.nows, finite, computed, self._expressions, strict=True
            ):
                now.finite = [taken]
                own += [read(now) for read in expressions]
        running.advance(self._states, finite, going)
        ended = before
        if first.limit and not all(finite):
            ended = tuple(
                why
                or (
                    f"{m.nonfinite_steps} steps in a row were not finite"
                    if plan.limit <= m.nonfinite_steps
                    else None
                )
                for why, m, plan in zip(before, running.states, self._states, strict=True)
            )
        tensors = population.tensors
        if first.tensors:
            fresh = {place: given[self._where[ref.index]] for place, ref in first.tensors.items()}
            if not all(going):
                fresh = {place: _selected(going, t, tensors[place]) for place, t in fresh.items()}  # type: ignore[index]
            tensors = {**tensors, **fresh}  # type: ignore[dict-item]
            running = RunningMembers(parts_of(running.states, fresh, only=True))
        results = StepResults(
            self._states, self._where, given, computed, kept, finite=finite, forms=self._forms
        )
        if not first.donated:
            return Population(running, tensors, results=results, ended=ended)
        population.hand_on(_SPENDER)
        return Population(running, tensors, results=results, ended=ended, lease=population.lease)


_FINITE = [True]  # what is assumed of a step before it is taken


def _whole(tensor: Tensor, dim: int | None, count: int) -> Tensor:
    """A tensor with an axis of members."""
    return tensor if dim == 0 else tensor.expand(count, *tensor.shape)


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
