"""Call a compiled graph on states; this runs at every step and is kept short."""

import itertools
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from torch import Tensor

from steploop.compilation.graph_inputs import Feed
from steploop.compilation.inductor import Run
from steploop.compilation.leaves import constants_of, counted_on_host, signature
from steploop.compilation.next_state import Advance
from steploop.compilation.plans import StepPlan
from steploop.core.state.train_state import TrainState
from steploop.core.steps.forward_pass import seeded_generators
from steploop.core.steps.set_rates import schedule

__all__ = ["Bound", "CompiledGraph"]

_GENERATIONS = itertools.count()


class Bound:
    """The states whose tensors are in the graphs' lists of inputs: the last step's results.

    Donated tensors are the same objects at every step, so the lists are made once and hold until other states
    come: a clone, one from a checkpoint, or one that an eager step gave.
    """

    __slots__ = ("_held", "generation")

    def __init__(self) -> None:
        self.generation = next(_GENERATIONS)
        self._held: list[tuple[Any, ...]] = []

    def holds(self, states: Sequence[TrainState]) -> bool:
        """Whether these are the bound states, with the same tensors and hyperparameters."""
        if len(states) != len(self._held):
            return False
        for state, (lease, tensors, hyper) in zip(states, self._held, strict=True):
            if state.lease is not lease or state.tensors is not tensors or state.hyper is not hyper:
                return False
        return True

    def take(self, states: Sequence[TrainState], *, same_tensors: bool) -> None:
        """Bind these states; if their tensors changed, remake every list of inputs."""
        self._held = [(s.lease, s.tensors, s.hyper) for s in states]
        if not same_tensors:
            self.generation = next(_GENERATIONS)


class CompiledGraph:
    """A compiled graph and its plan, for batches of one shape and states of one kind."""

    def __init__(self, plan: StepPlan, run: Run, names: Sequence[str], states: Sequence[TrainState]) -> None:
        self.plan = plan
        self.run = run
        self._like = [signature(state) for state in states]
        self._constants = [constants_of(state.hyper, cycled=plan.cycled) for state in states]
        self._reads = [
            (names.index(name), attrgetter(path), value) for (name, path), value in plan.reads.items()
        ]
        given = plan.graph.wiring.given
        outputs = 1 + max((where for where in given if where >= 0), default=-1)
        passed = iter(range(outputs, outputs + len(given)))
        where = [index if index >= 0 else next(passed) for index in given]
        plans = [plan.states[name] for name in names]
        self._advances = [Advance(p, where) for p in plans]
        self._passes = any(index < 0 for index in given)
        self._donated = all(p.donated for p in plans)
        self._before = [(i, fn) for i, p in enumerate(plans) for fn in p.before]
        self._after = [(i, fn) for i, p in enumerate(plans) for fn in p.after]
        self._limits = [(i, p.limit) for i, p in enumerate(plans) if p.limit and p.on_host]
        self._feed = Feed(plan, names, states[0].device, on_host=all(map(counted_on_host, states)))
        self._generation = -1

    def reads_as_traced(self, states: Sequence[TrainState]) -> bool:
        """Whether the plain values that the trace read are unchanged."""
        return not self._reads or all(read(states[i]) == value for i, read, value in self._reads)

    def fits(self, states: Sequence[TrainState]) -> bool:
        """Whether the graph fits these states; a full check, made when new states come."""
        return (
            [signature(state) for state in states] == self._like
            and [constants_of(state.hyper, cycled=self.plan.cycled) for state in states] == self._constants
            and self.reads_as_traced(states)
        )

    def __call__(self, bound: Bound, states: Sequence[TrainState], batch: list[Tensor]) -> list[TrainState]:
        """Take one step: write the numbers, run the graph, make the states, apply the schedules."""
        feed = self._feed
        if self._generation != bound.generation:
            feed.bind(states)
            self._generation = bound.generation
        if self._before:
            states = list(states)
            for i, learning_rate in self._before:
                states[i] = schedule(states[i], learning_rate)
        inputs = feed.arguments(states, batch)
        if self._donated:
            # whatever ends the call before its time may leave the tensors half updated: then nobody may use them
            for state in states:
                state.lease.tear()
        if self.plan.graph.random:
            first = states[0]
            with seeded_generators(first.machine, first.seed, first.attempted_steps, 0):
                given = self.run(inputs)
        else:
            given = self.run(inputs)
        if self._passes:
            given = [*given, *feed.passed(states, batch)]
        new = [advance(state, given) for advance, state in zip(self._advances, states, strict=True)]
        for i, learning_rate in self._after:
            new[i] = schedule(new[i], learning_rate)
        bound.take(new, same_tensors=self._donated)
        return new

    def over_limit(self, new: Sequence[TrainState]) -> bool:
        """Whether too many steps in a row were not finite."""
        return any(new[i].nonfinite_steps >= limit for i, limit in self._limits)
