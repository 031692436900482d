"""Take several compiled steps in a row: the graph of one step, without making the states in between.

A step on a small model is 35 us of arithmetic and 50 us of Python around it: the state that comes out, and the checks of
the one that goes in. In a row both are done once, and every step in between costs its graph, its numbers and its
schedule; its bits are those of a single step, for it is the same graph. One graph of eight steps took 0.9 of the time
of eight graphs in a row and 91 s to compile instead of 12 s, and nothing promises that it sums in the same order.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import attrs
from torch import Tensor

from steploop.compilation.bound_states import Bound
from steploop.compilation.flattening import Flat, UsualForm, flatten
from steploop.compilation.graph_calls import CompiledGraph
from steploop.compilation.host_numbers import Now
from steploop.core.state.surroundings import is_usual
from steploop.core.state.train_state import TrainState

__all__ = ["MOST_LISTED", "NOTHING", "Row", "Stretch"]

NOTHING: Any = object()  # no batch
MOST_LISTED = 32  # steps whose numbers are computed ahead: more would gain nothing


@attrs.frozen(eq=False, kw_only=True)
class Stretch:
    """Steps that were taken in a row. All of them were finite, but for the last one perhaps.

    Attributes:
        before: the state that went into the last step; spent.
        batch: of the last step.
        state: after it.
        steps: how many, >= 1.
        following: a batch that was fetched and not trained on, if there is one.
    """

    before: Any
    batch: Any
    state: Any
    steps: int = 1
    following: tuple[Any, ...] = ()


@attrs.frozen(eq=False)
class _Step:
    """A step that may be taken: what the host knows at it, the tensors of its batch, and the batch."""

    now: Now
    tensors: list[Tensor]
    batch: Any


class Row:
    """Steps in a row by one graph.

    Args:
        graph: that may run now.
        bound: the states of ``now``.
        now: of the first step.
        flat: the first batch, flat.
        batch: the first one.
        results: gets what each step leaves in flight: a list, with one for each state.
    """

    def __init__(
        self,
        graph: CompiledGraph,
        bound: Bound,
        now: Now,
        flat: Flat,
        *,
        batch: Any,
        results: list[Any] | None,
    ) -> None:
        self._key = flat[1]
        self._form = UsualForm.of(batch, flat)
        now = graph.prepare(bound, now)
        self._graph = graph
        self._bound = bound
        self._held = bound.tensors
        self._first = _Step(Now(list(map(_own, now.states)), now.numbers, now.finite), flat[0], batch)
        self._results = results

    def listed(self, batches: Sequence[Any]) -> Stretch:
        """Take the first step and those on batches that are there already, until one is not finite.

        What the host computes for all of them comes first: in between, the arithmetic would drive it out of the caches,
        and it would take twice as long.
        """
        steps = [self._first]
        for batch in batches:
            if (after := self._following(steps[-1], batch)) is None:
                break
            steps.append(after)
        for number, step in enumerate(steps, 1):
            given, drawn = self._launched(step)
            if number == len(steps) or not self._graph.finite(given):
                break
        return self._ended(step, given, drawn, steps=number)

    def fetched(self, batches: Iterator[Any], most: int | None) -> Stretch:
        """Take the first step and those on batches that are fetched one by one, by code that may change anything."""
        step, number, following = self._first, 1, NOTHING
        while True:
            given, drawn = self._launched(step)
            if number == most or not self._graph.finite(given):
                break
            following = next(batches, NOTHING)
            if following is NOTHING or not self._as_before(step.now.states):
                break
            if (after := self._following(step, following)) is None:
                break
            step, number, following = after, number + 1, NOTHING
        taken = self._ended(step, given, drawn, steps=number)
        return taken if following is NOTHING else attrs.evolve(taken, following=(following,))

    def _launched(self, step: _Step) -> tuple[Sequence[Any], list[Tensor]]:
        given, drawn = self._graph.launch(step.now, step.tensors)
        if self._results is not None:
            complete = self._graph.complete(step.now, step.tensors, drawn, given)
            self._results.append(self._graph.results(step.now.states, complete))
        return given, drawn

    def _ended(self, step: _Step, given: Sequence[Any], drawn: list[Tensor], *, steps: int) -> Stretch:
        graph, bound, now = self._graph, self._bound, step.now
        own = bound.tensors == self._held  # or fetching a batch has trained another state
        new = graph.finish(bound, now, graph.complete(now, step.tensors, drawn, given))
        if not own:
            bound.take(new)
        return Stretch(before=now.states, batch=step.batch, state=new, steps=steps)

    def _as_before(self, states: Sequence[TrainState]) -> bool:
        """Whether code that has run since the last step changed nothing that a step depends on."""
        if self._bound.tensors != self._held:
            return False
        for state in states:
            if not is_usual(state.machine):
                return False
            state.machine.module.check()
        return self._graph.unchanged(states)

    def _following(self, step: _Step, batch: Any) -> _Step | None:
        """The step after one that was finite; None where this graph cannot take it."""
        flat = None if self._form is None else self._form.flat(batch)
        if flat is None:
            try:
                flat = flatten(batch)
            except Exception:  # noqa: BLE001  (raised again by the single step)
                return None
            if flat[1] != self._key:
                return None
        tensors, _, numbers = flat
        graph = self._graph
        now = Now(list(map(_own, step.now.states)), numbers, step.now.finite)
        graph.count(now.states)
        if graph.decides and (not graph.decides_alike(now) or graph.in_doubt(now)):
            return None
        return _Step(now, tensors, batch)


def _own(state: TrainState) -> TrainState:
    """A copy of a state, to be counted on in place; its tensors are the same."""
    return state.over({**state.__dict__, "hyper": tuple(map(dict, state.hyper))})
