"""Take many compiled steps: what a fold over batches adds to single steps."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs

from steploop.compilation.compiled_step import CompiledStep
from steploop.compilation.flattening import Flat, flatten
from steploop.compilation.graph_calls import CompiledGraph
from steploop.compilation.host_numbers import Now
from steploop.compilation.step_failures import raise_nonfinite
from steploop.compilation.stretches import MOST_LISTED, NOTHING, Row, Stretch
from steploop.core.state.parts import InFlight
from steploop.core.state.surroundings import is_usual
from steploop.core.state.train_state import TrainState

__all__ = ["FoldingStep"]


class FoldingStep(CompiledStep):
    """The result of ``steploop.compile(train_step)``: takes a step, as ``train_step`` does, or many in a row."""

    def fold(self, state: Any, batches: Iterable[Any]) -> Any:
        """Take a step on each batch: ``functools.reduce(step, batches, state)`` to the bit, in less time.

        The states in between are not made, which on a small model takes as long as the arithmetic. Whatever is unusual
        (another form of batch, a branch, a step that is not finite) is done by single steps, so that nothing differs.

            >>> state = step.fold(state, batches)                            # doctest: +SKIP
            >>> state = functools.reduce(step.fold, groups, state)           # doctest: +SKIP

        Args:
            state: as for a single step.
            batches: any iterable; each batch is fetched when the step before has been taken. From a list or a tuple they
                come quickest: fetching them runs no code that could change what a step depends on, which is looked at
                before each step otherwise.

        Raises:
            As single steps do.
        """
        return self._fold(state, batches, None)

    def scan(self, state: Any, batches: Iterable[Any]) -> tuple[Any, list[Any]]:
        """Take a step on each batch, as ``fold`` does, and keep what each of them computed.

            >>> state, results = step.scan(state, batches)                   # doctest: +SKIP
            >>> losses = torch.stack([r.loss for r in results])              # doctest: +SKIP

        Returns:
            The last state, and for each step its results: ``loss``, ``outputs``, ``grad_norm``, ``clipped_norm`` and
            ``finite``, as the state after it has them; in a dictionary by name where there are several states.
        """
        results: list[Any] = []
        state = self._fold(state, batches, results)
        return state, results

    def _fold(self, state: Any, batches: Iterable[Any], results: list[Any] | None) -> Any:
        if type(batches) in {list, tuple}:
            known: Any = batches
            at = 0
            while at < len(known):
                listed = known[at + 1 : at + MOST_LISTED]
                taken = self.stretch(state, known[at], iter(()), listed=listed, results=results)
                state, at = taken.state, at + taken.steps
            return state
        rest = iter(batches)
        batch = next(rest, NOTHING)
        while batch is not NOTHING:
            taken = self.stretch(state, batch, rest, results=results)
            state = taken.state
            batch = taken.following[0] if taken.following else next(rest, NOTHING)
        return state

    def stretch(
        self,
        state: Any,
        batch: Any,
        rest: Iterator[Any],
        *,
        listed: Sequence[Any] = (),
        most: int | None = None,
        results: list[Any] | None = None,
    ) -> Stretch:
        """Take a step, and those on the next batches that need nothing else than its graph.

        Args:
            state: as for a single step.
            batch: of the first step.
            rest: gives the batches after it, by code that may change what a step depends on;
            listed: or these batches, which are there.
            most: steps; None: all that can be taken.
            results: gets the results of each step.

        Returns:
            The steps taken, >= 1; all but the last were finite.
        """
        single = isinstance(state, TrainState)
        begun = None if most == 1 or self._eager else self._begun(state, batch)
        if begun is None:
            new = self(state, batch)
            if results is not None:
                results.append(new.flight if single else {name: one.flight for name, one in new.items()})
            return Stretch(before=state, batch=batch, state=new)
        graph, now, flat = begun
        names = [""] if single else list(state)
        kept: list[list[InFlight]] | None = None if results is None else []
        row = Row(graph, self._bound, now, flat, batch=batch, results=kept)
        taken = row.listed(listed) if listed else row.fetched(rest, most)
        if graph.over_limit(taken.state):
            raise_nonfinite(self.train_step, state, taken.before, taken.state, taken.batch)
        if results is not None:
            results += [one[0] if single else dict(zip(names, one, strict=True)) for one in kept or ()]
        if single:
            return attrs.evolve(taken, before=taken.before[0], state=taken.state[0])
        before, new = (dict(zip(names, of, strict=True)) for of in (taken.before, taken.state))
        return attrs.evolve(taken, before=before, state=new)

    def _begun(self, state: Any, batch: Any) -> tuple[CompiledGraph, Now, Flat] | None:
        """The graph for a row of steps that begins here; None where a single step has more to do."""
        single = isinstance(state, TrainState)
        states = [state] if single else list(state.values()) if isinstance(state, Mapping) else []
        if not self._bound.holds(states) or not is_usual(states[0].machine):
            return None
        try:
            flat = flatten(batch)
        except Exception:  # noqa: BLE001  (raised again by the single step)
            return None
        graph = self._store.current.get(flat[1])
        if graph is None or not graph.in_a_row or not graph.fits(states, self._bound):
            return None
        if any(s.generation != s.lease.generation for s in states):
            return None
        now = Now(states, flat[2], [True] * len(states))
        if not graph.holds(now) or graph.in_doubt(now):
            return None
        return graph, now, flat
