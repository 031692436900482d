"""Run a train step as one compiled graph per shape of batch, and eagerly where necessary."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import attrs

from steploop.compilation.aten_graph import check_torch, reads_a_value
from steploop.compilation.auto_choice import measure
from steploop.compilation.baked import Baked
from steploop.compilation.bound_states import Bound
from steploop.compilation.capture import trace_step
from steploop.compilation.diagnosis import diagnosed
from steploop.compilation.flattening import Flat, UsualForm, describe, flatten
from steploop.compilation.graph_calls import CompiledGraph
from steploop.compilation.graph_outputs import SlotsGrew
from steploop.compilation.graph_store import GraphStore
from steploop.compilation.host_numbers import Now
from steploop.compilation.inductor import compile_graph
from steploop.compilation.plans import StepPlan
from steploop.compilation.step_failures import raise_nonfinite, refuse_shared
from steploop.compilation.step_of_parts import PASSES_ONLY, StepOfParts
from steploop.core.state.surroundings import is_usual, shield
from steploop.core.state.train_state import TrainState
from steploop.errors import (
    CompileError,
    ConfigError,
    ObjectiveError,
    SteploopError,
    StepOrderError,
)

__all__ = ["CompiledStep", "Figures"]


_FINITE = [True]  # what is assumed of the step of a single state


@attrs.frozen(kw_only=True)
class Figures:
    """The cost and gain of compiling, which a run records.

    Attributes:
        form: how steps run: "compiled", "eager", or "undecided" before the first graph.
        reason: one sentence that says why.
        compile_s: seconds that tracing and compiling took, for each graph.
        eager_us: microseconds per step in eager, where it was measured.
        compiled_us: microseconds per step compiled, where it was measured.
    """

    form: Literal["compiled", "eager", "undecided"] = "undecided"
    reason: str = "no step was compiled yet"
    compile_s: tuple[float, ...] = ()
    eager_us: float | None = None
    compiled_us: float | None = None


class CompiledStep:
    """Takes single steps: what ``steploop.compile(train_step)`` gives, called like ``train_step`` itself.

    Attributes:
        train_step: the step as it was written.
        mode: True, or "auto".
        figures: what compiling cost and gave so far.
    """

    def __init__(
        self,
        train_step: Callable[[Any, Any], Any],
        mode: Literal[True, "auto"],
        report: Callable[[str], None] | None,
    ) -> None:
        self.train_step = train_step
        self.mode = mode
        self.figures = Figures()
        self._report: Callable[[str], object] = report or (lambda _: None)
        self._bound = Bound()
        self._store = GraphStore()
        self._form: UsualForm | None = None  # of the last batch,
        self._graph: CompiledGraph | None = None  # and the graph that ran for it
        self._refused: set[Any] = set()  # forms of batches that cannot be compiled, under mode="auto"
        self._eager = False
        self._parts: StepOfParts | None = None  # where states have ranks

    def __call__(self, state: Any, batch: Any) -> Any:
        """Take one step, like ``train_step(state, batch)``.

        Raises:
            CompileError: the step cannot be captured as a graph (mode=True).
            SpentStateError: ``state`` was given away.
            NonFiniteError: as many steps in a row as ``optimizer_step`` allows were not finite.
        """
        if self._eager:
            return self.train_step(state, batch)
        single = isinstance(state, TrainState)
        states = [state] if single else list(state.values()) if isinstance(state, Mapping) else []
        if not single and not (states and all(isinstance(s, TrainState) for s in states)):
            what = f"takes a TrainState or a mapping of them, but was called with a {type(state).__name__}."
            self._give_up(type(state), CompileError(f"A compiled train step {what}"))
            return self.train_step(state, batch)
        machine = states[0].machine
        if is_usual(machine):
            return self._step(state, states, batch, single=single)
        with shield(machine):
            return self._step(state, states, batch, single=single)

    def _step(self, state: Any, states: list[TrainState], batch: Any, *, single: bool) -> Any:
        flat = None if self._form is None else self._form.flat(batch)
        if flat is None:
            try:
                flat = flatten(batch)
            except Exception as error:  # noqa: BLE001  (raised again unless mode is "auto")
                if not _have_ranks(states):
                    self._give_up(type(batch), error)
                return self._without_graph(state, states, batch)
            self._form, self._graph = UsualForm.of(batch, flat), self._store.current.get(flat[1])
        for one in states:
            if one.generation != one.lease.generation:
                one.check_alive("train_step")
        now = Now(states, flat[2], _FINITE if single else [True] * len(states))
        graph, bound = self._graph, self._bound
        if graph is None or not bound.holds(states) or not graph.fits(states, bound) or not graph.holds(now):
            graph = self._graph = None if _have_ranks(states) else self._find(state, now, batch, flat)
            if graph is None:
                return self._without_graph(state, states, batch)
        new = graph(bound, now, flat[0])
        if new is None:
            return self.train_step(state, batch)
        if graph.over_limit(new):
            raise_nonfinite(self.train_step, state, states, new, batch)
        return new[0] if single else dict(zip(state, new, strict=True))

    def go_on(
        self, seen: Mapping[str, int], tell: Callable[[str, int, int], object], *, chosen: bool
    ) -> None:
        """Decide as the process before would have, on which the bits depend.

        Args:
            seen: form of a batch -> how often it came.
            tell: called with such a form, how often it has come, and the attempted step (from 1): what the next process needs.
            chosen: whether ``mode="auto"`` has found the compiled step to be the faster one.
        """
        self._store.remember(seen, tell)
        if chosen:
            self.figures = attrs.evolve(self.figures, form="compiled", reason="chosen before the resume")

    # -- finding or making a graph ---------------------------------------------------------------------------

    def _find(self, state: Any, now: Now, batch: Any, flat: Flat) -> CompiledGraph | None:
        """Find or make the graph for these states and this batch; None if the step runs eagerly."""
        states, key = now.states, flat[1]
        if not self._bound.holds(states):
            self._bound.take(states)
        try:
            graph = self._store.find(key, now, self._bound)
            if graph is not None or key in self._refused or not self._store.worth_compiling(states, key):
                return graph
            graph = self._make(state, now, batch, flat)
            if self.mode == "auto" and self.figures.form == "undecided":
                self._choose(graph, state, batch)
        except SlotsGrew:
            return None
        except Exception as error:  # noqa: BLE001  (raised again unless mode is "auto")
            self._give_up(key, error)
            return None
        if self._eager:
            return None
        if self.figures.form != "compiled":
            self.figures = attrs.evolve(self.figures, form="compiled", reason="compiling was asked for")
        self._store.current[key] = graph
        if not self._bound.holds(states):
            self._bound.take(states)
        return graph

    def _without_graph(self, state: Any, states: Sequence[TrainState], batch: Any) -> Any:
        """Take a step in eager; where a state has ranks, with passes that are compiled part by part."""
        if self._eager or not _have_ranks(states):
            return self.train_step(state, batch)
        parts = self._parts
        if parts is None:
            parts = self._parts = StepOfParts(self.train_step, self.mode, self._note_pass)
        if self.mode == "auto" and self.figures.form == "undecided":
            took, why = parts.measured(state, states, batch)
            if took is not None:
                self.figures = attrs.evolve(
                    self.figures, eager_us=took["eager"], compiled_us=took["compiled"]
                )
            if why is not None:
                self._go_on_in_eager(why)
                return self.train_step(state, batch)
        if self.figures.form != "compiled":
            self.figures = attrs.evolve(self.figures, form="compiled", reason=PASSES_ONLY)
        return parts(state, states, batch)

    def _note_pass(self, what: str, seconds: float) -> None:
        self.figures = attrs.evolve(self.figures, compile_s=(*self.figures.compile_s, seconds))
        self._report(f"compiled the passes of parts of {what}: {seconds:.0f} s")

    def _give_up(self, key: Any, error: Exception) -> None:
        """Under mode="auto", run batches of this form in eager and say so once; else raise."""
        if self.mode is True:
            raise error if isinstance(error, SteploopError) else diagnosed(error) from error
        if key in self._refused:
            return
        self._refused.add(key)
        reason = f"the step cannot be compiled: {error}"
        if not self._store:
            self.figures = attrs.evolve(self.figures, form="eager", reason=reason)
        self._report(f"goes on in eager for batches of this form; {reason}")

    def _make(self, state: Any, now: Now, batch: Any, flat: Flat) -> CompiledGraph:
        """Trace and compile; reuse an equal graph that is already compiled."""
        check_torch()
        states, key = now.states, flat[1]
        names = [""] if isinstance(state, TrainState) else list(state)
        self._report(f"compiling the train step for a batch of {describe(key)}")
        begin = time.perf_counter()
        try:
            plan, baked = self._trace(dict(zip(names, states, strict=True)), batch, flat)
            refuse_shared(plan, states, flat[0])
        except (SlotsGrew, ConfigError, ObjectiveError, StepOrderError):
            raise
        except Exception as error:
            raise diagnosed(error) from error
        run = self._store.compiled_before(plan) or compile_graph(plan.graph, plan.mode)
        seconds = time.perf_counter() - begin
        graph = CompiledGraph(plan, run, names, states, baked)
        self._store.add(key, graph)
        self.figures = attrs.evolve(self.figures, compile_s=(*self.figures.compile_s, seconds))
        self._report(f"compiling: {seconds:.0f} s")
        return graph

    def _trace(self, states: dict[str, TrainState], batch: Any, flat: Flat) -> tuple[StepPlan, Baked]:
        baked = Baked(self.train_step, [s.model for s in states.values()])
        try:
            return trace_step(self.train_step, states, batch, flat, baked), baked
        except Exception as error:
            # torch may have been given one of our numbers where it takes Python's only
            if not isinstance(error, TypeError) and not reads_a_value(error):
                raise
            return trace_step(self.train_step, states, batch, flat, baked, fixed=True), baked

    # -- mode="auto" ---------------------------------------------------------------------------------------------

    def _choose(self, graph: CompiledGraph, state: Any, batch: Any) -> None:
        """Choose the faster form, by a few steps of each on clones of the state."""
        bound = Bound()

        def compiled(one: Any, batch: Any) -> Any:
            states = [one] if isinstance(one, TrainState) else list(one.values())
            if not bound.holds(states):
                bound.take(states)
            tensors, _, numbers = flatten(batch)
            new = graph(bound, Now(states, numbers, [True] * len(states)), tensors)
            if new is None:
                return self.train_step(one, batch)
            return new[0] if isinstance(one, TrainState) else dict(zip(one, new, strict=True))

        took = measure({"eager": self.train_step, "compiled": compiled}, state, batch)
        eager, fused = took["eager"], took["compiled"]
        self.figures = attrs.evolve(self.figures, eager_us=eager, compiled_us=fused)
        figures = f"{fused:.0f} us a step compiled, {eager:.0f} us in eager"
        if fused < eager:
            self.figures = attrs.evolve(self.figures, form="compiled", reason=f"measured: {figures}")
            self._report(f"compiled is the faster: {figures}")
        else:
            self._go_on_in_eager(f"measured: {figures}")

    def _go_on_in_eager(self, reason: str) -> None:
        self._eager = True
        self.figures = attrs.evolve(self.figures, form="eager", reason=reason)
        self._report(f"goes on in eager; {reason}")


def _have_ranks(states: Sequence[TrainState]) -> bool:
    return any(state.ranks is not None for state in states)
