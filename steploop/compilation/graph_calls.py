"""Call a compiled graph on states; this runs at every step and is kept short."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from steploop.compilation.baked import Baked
from steploop.compilation.bound_states import Bound
from steploop.compilation.flattening import Reference, builder, renumbered
from steploop.compilation.graph_inputs import Feed
from steploop.compilation.host_numbers import Guard, Now
from steploop.compilation.leaves import constants_of, counted_on_host, signature
from steploop.compilation.next_state import SPENDER, Advance
from steploop.compilation.parameter_flags import flags_of, same_flags
from steploop.compilation.plans import StepPlan
from steploop.compilation.repeated_parts import Run
from steploop.core.ambient_generators import generators_of
from steploop.core.seeds import fold_in
from steploop.core.state.parts import InFlight
from steploop.core.state.train_state import TrainState
from steploop.core.steps.set_rates import put_rates, schedule, values_at

__all__ = ["CompiledGraph", "positions"]

_NOTHING: list[Tensor] = []


class CompiledGraph:
    """A compiled graph and its plan, for batches of one form and states of one kind."""

    def __init__(
        self, plan: StepPlan, run: Run, names: Sequence[str], states: Sequence[TrainState], baked: Baked
    ) -> None:
        self.plan = plan
        self.run = run
        self.baked = baked
        self._names = names
        self._like = [signature(state) for state in states]
        self._constants = [constants_of(state.hyper, cycled=plan.cycled) for state in states]
        self._flags = [flags_of(state) for state in states]
        self._guards = [(guard.read, guard.value) for guard in plan.guards]
        self._doubtful = [guard for guard in plan.guards if guard.after]
        where, self._computed = positions(plan)
        plans = [plan.states[name] for name in names]
        self._advances = [Advance(p, where) for p in plans]
        self._left = [
            (place, key, builder(renumbered(value, lambda i: Reference(where[i]))))
            for place, key, value in plan.left
        ]
        self._passes = any(index < 0 for index in plan.graph.outline.wiring.given)
        self._donated = all(p.donated for p in plans)
        self._before = [(i, fn) for i, p in enumerate(plans) for fn in p.before]
        self._after = [(i, fn) for i, p in enumerate(plans) for fn in p.after if not p.on_host]
        self._between = [*((i, fn) for i, p in enumerate(plans) for fn in p.after), *self._before]
        draws = plan.graph.draws
        self._draws = bool(draws.program)
        self._seeded = plan.graph.outline.random and draws.seed is not None
        self._limits = [(i, p.limit) for i, p in enumerate(plans) if p.limit and p.on_host]
        self._feed = Feed(plan, names, states[0].device, on_host=all(map(counted_on_host, states)))
        self._written = [
            i
            for i, taken in enumerate(plan.graph.outline.wiring.inputs)
            if taken in plan.graph.outline.written
        ]
        self._finite = [
            where[p.flight["finite"].index] for p in plans if isinstance(p.flight["finite"], Reference)
        ]
        self._fed = self._fitted = -1
        self.decides = bool(plan.guards)  # whether Python decides by numbers
        # whether several steps may be taken in a row without making the states in between
        self.in_a_row = (
            self._donated
            and not plan.reads_results
            and not self._left
            # a limit of 1: then the step that raises is the first of its row, as with any other
            and all(p.on_host and p.batches == 1 and p.limit != 1 and not p.tensors for p in plans)
        )

    # -- whether it may run ------------------------------------------------------------------------------------------

    def holds(self, now: Now) -> bool:
        """Whether all that Python read and decided while tracing is as it was."""
        return self.unchanged(now.states) and (not self._guards or self.decides_alike(now))

    def unchanged(self, states: Sequence[TrainState]) -> bool:
        """Whether all that Python read besides numbers is as it was."""
        try:
            if not self.baked.unchanged():
                return False
            for state, flags in zip(states, self._flags, strict=True):
                if not same_flags(state, flags):
                    return False
        except Exception:  # noqa: BLE001  (what was read is gone)
            return False
        return True

    def decides_alike(self, now: Now) -> bool:
        """Whether all that Python decided by numbers while tracing is as it was."""
        try:
            # in their order: a later one may not be asked where an earlier one differs
            for read, value in self._guards:
                if read(now) != value:
                    return False
        except Exception:  # noqa: BLE001  (a division by 0, a table that ends: then Python decides something else)
            return False
        return True

    def fits(self, states: Sequence[TrainState], bound: Bound) -> bool:
        """Whether the bound states are of the kind that the graph was made for; a full check, made when others come."""
        if self._fitted == bound.origin:
            return True
        fits = [signature(state) for state in states] == self._like and [
            constants_of(state.hyper, cycled=self.plan.cycled) for state in states
        ] == self._constants
        if fits:
            self._fitted = bound.origin
        return fits

    def in_doubt(self, now: Now) -> bool:
        """Whether Python would decide otherwise if this step turns out not to be finite."""
        return any(_differs(guard, now) for guard in self._doubtful)

    def over_limit(self, new: Sequence[TrainState]) -> bool:
        """Whether too many steps in a row were not finite."""
        for i, limit in self._limits:  # noqa: SIM110  (a third of the time of any(...), at every step)
            if new[i].nonfinite_steps >= limit:
                return True
        return False

    # -- running it --------------------------------------------------------------------------------------------------

    def __call__(self, bound: Bound, now: Now, batch: list[Tensor]) -> list[TrainState] | None:
        """Take one step: write the numbers, run the graph, make the states, apply the schedules.

        Returns:
            The new states; None where the step has to be taken in eager: it is not finite, and Python decides by that.
            Then the old states are whole.
        """
        now = self.prepare(bound, now)
        states = now.states
        drawn = self._drawn(states) if self._draws else _NOTHING
        inputs = self._feed.arguments(now, batch, drawn)
        kept = None
        if self._doubtful and self.in_doubt(now):
            kept = [(inputs[i], inputs[i].clone()) for i in self._written]
        if self._donated:
            # whatever ends the call before its time may leave the tensors half updated: then nobody may use them
            for state in states:
                state.lease.tear()
        given = self._run_seeded(states, inputs) if self._seeded else self.run(inputs)
        if kept is not None and not self.finite(given):
            self._take_back(states, kept)
            return None
        if self._passes or self._computed:
            given = self.complete(now, batch, drawn, given)
        return self.finish(bound, now, given)

    def launch(self, now: Now, batch: list[Tensor]) -> tuple[Sequence[Tensor], list[Tensor]]:
        """Run the graph once, in a row of steps: what it gave, and what was drawn for it. The states of ``now`` are spent."""
        drawn = self._drawn(now.states) if self._draws else _NOTHING
        inputs = self._feed.arguments(now, batch, drawn)
        for state in now.states:
            state.lease.tear()
        given = self._run_seeded(now.states, inputs) if self._seeded else self.run(inputs)
        for state in now.states:
            state.lease.hand_on(SPENDER)
        return given, drawn

    def count(self, states: Sequence[TrainState]) -> None:
        """Count a step that was finite, and set the rates of the next one, in place: in states that nobody else has."""
        for i, advance in enumerate(self._advances):
            advance.count(states[i])
        for i, learning_rate in self._between:
            state: Any = states[i]
            put_rates(state.hyper, values_at(state.machine, learning_rate, state.applied_steps))

    def results(self, states: Sequence[TrainState], given: Sequence[Any]) -> list[InFlight]:
        """What a step leaves in flight, for each state."""
        return [a.results(s, given) for a, s in zip(self._advances, states, strict=True)]

    def prepare(self, bound: Bound, now: Now) -> Now:
        """Check the modules, set the rates, and bind the states' tensors."""
        states = now.states
        for state in states:
            state.machine.module.check()
        if self._before:
            states = list(states)
            for i, learning_rate in self._before:
                states[i] = schedule(states[i], learning_rate)
            now = Now(states, now.numbers, now.finite)
        if self._fed != bound.tensors:
            self._feed.bind(states)
            self._fed = bound.tensors
        return now

    def finish(self, bound: Bound, now: Now, given: Sequence[Any]) -> list[TrainState]:
        """Make the new states."""
        new = [self._advances[i](state, given) for i, state in enumerate(now.states)]
        for i, learning_rate in self._after:
            new[i] = schedule(new[i], learning_rate)
        for place, key, build in self._left:
            place[key] = build(given)
        bound.follow(new, same_tensors=self._donated)
        return new

    def finite(self, given: Sequence[Tensor]) -> bool:
        """Whether the step was finite, for every state."""
        for i in self._finite:  # noqa: SIM110  (a third of the time of all(...), at every step)
            if not given[i]:
                return False
        return True

    def _drawn(self, states: Sequence[TrainState]) -> list[Tensor]:
        return self.plan.graph.draws.run(dict(zip(self._names, states, strict=True)))

    def complete(
        self, now: Now, batch: list[Tensor], drawn: list[Tensor], given: Sequence[Any]
    ) -> Sequence[Any]:
        """What the graph gave, inputs that it passes on, and numbers of the host."""
        if self._passes:
            given = [*given, *self._feed.passed(now, batch, drawn)]
        if self._computed:
            given = self._with_numbers(now, given)
        return given

    def _with_numbers(self, now: Now, given: Sequence[Any]) -> list[Any]:
        """What the graph gave, and the numbers of the host that stand among the outputs."""
        if self._finite:
            now = Now(now.states, now.numbers, [bool(given[i]) for i in self._finite])
        return [*given, *(read(now) for read in self._computed)]

    def _take_back(self, states: Sequence[TrainState], kept: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Undo what the graph wrote."""
        for tensor, value in kept:
            tensor.copy_(value)
        if self._donated:
            for state in states:
                state.lease.mend()

    def _run_seeded(self, states: Sequence[TrainState], inputs: list[Tensor]) -> Any:
        """Run a graph that draws for itself, with the generators seeded as eager seeds them."""
        name, number = self.plan.graph.draws.seed  # type: ignore[misc]  # it is no None
        state = states[self._names.index(name)]
        machine = state.machine
        if machine.generators is None:
            machine.generators = generators_of(machine.device)
        kept = [generator.get_state() for generator in machine.generators]
        try:
            seed = fold_in(state.seed, state.attempted_steps, number)
            for generator in machine.generators:
                generator.manual_seed(seed)
            return self.run(inputs)
        finally:
            for generator, before in zip(machine.generators, kept, strict=True):
                generator.set_state(before)


def _differs(guard: Guard, now: Now) -> bool:
    chances = [(True, False) if i in guard.after else (True,) for i in range(len(now.finite))]
    return any(
        guard.read(Now(now.states, now.numbers, c)) != guard.value for c in itertools.product(*chances)
    )


def positions(plan: StepPlan) -> tuple[list[int], list[Callable[[Now], Any]]]:
    """For each reference of a plan, where its value stands: outputs, inputs passed through, numbers of the host."""
    given = plan.graph.outline.wiring.given
    outputs = 1 + max((index for index in given if index >= 0), default=-1)
    passed = itertools.count(outputs)
    places = [index if index >= 0 else next(passed) for index in given]
    tensors, last = iter(places), next(passed)
    where: list[int] = []
    computed: list[Callable[[Now], Any]] = []
    for index in range(len(given) + len(plan.computed)):
        if index in plan.computed:
            where.append(last + len(computed))
            computed.append(plan.computed[index])
        else:
            where.append(next(tensors))
    return where, computed
