"""Run a train step as one compiled graph per shape of batch, and eagerly where necessary."""

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import attrs
from torch import Tensor

from steploop.compilation.auto_choice import measure
from steploop.compilation.capture import trace_step
from steploop.compilation.diagnosis import diagnosed
from steploop.compilation.flattening import describe, flatten
from steploop.compilation.graph_calls import Bound, CompiledGraph
from steploop.compilation.graph_outputs import SlotsGrew
from steploop.compilation.inductor import Run, check_torch, compile_graph
from steploop.compilation.plans import StepPlan
from steploop.core.state.train_state import TrainState
from steploop.errors import CompileError, NonFiniteError

__all__ = ["CompiledStep", "Figures"]

_COMPILED_WHEN_SEEN = (
    3  # a shape other than the first is compiled when it comes for this time: a last batch costs no graph
)
_USUAL_SHAPES = 2  # more shapes than this are compiled with a warning,
_MOST_SHAPES = 8  # and more than this run in eager


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
    """The result of ``steploop.compile(train_step)``, called like ``train_step`` itself.

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
        self._current: dict[Any, CompiledGraph] = {}  # key of a batch -> the graph that ran last for it
        self._graphs: dict[Any, list[CompiledGraph]] = {}
        self._seen: dict[Any, int] = {}
        self._eager = False
        self._gave_up = False  # more shapes than are worth a graph have come

    def __call__(self, state: Any, batch: Any) -> Any:
        """Take one step, like ``train_step(state, batch)``.

        Raises:
            CompileError: the step cannot be captured as a graph (mode=True).
            SpentStateError: ``state`` was given away.
            NonFiniteError: as many steps in a row as ``optimizer_step`` allows were not finite.
        """
        if self._eager:
            return self.train_step(state, batch)
        tensors, key = flatten(batch)
        single = isinstance(state, TrainState)
        states = [state] if single else list(state.values())
        for one in states:
            if one.generation != one.lease.generation:
                one.check_alive("train_step")
        graph = self._current.get(key)
        if graph is None or not self._bound.holds(states) or not graph.reads_as_traced(states):
            graph = self._find(state, states, batch, tensors, key)
            if graph is None:
                return self.train_step(state, batch)
        new = graph(self._bound, states, tensors)
        if graph.over_limit(new):
            self._raise_nonfinite(state, states, new, batch)
        return new[0] if single else dict(zip(state, new, strict=True))

    # -- finding or making a graph ---------------------------------------------------------------------------

    def _find(
        self, state: Any, states: list[TrainState], batch: Any, tensors: list[Tensor], key: Any
    ) -> CompiledGraph | None:
        """Find or make the graph for these states and this batch; None if the step runs eagerly."""
        for graph in self._graphs.get(key, ()):
            if graph.fits(states):
                self._use(graph, states, key)
                return graph
        if not self._worth_compiling(states, key):
            return None
        try:
            graph = self._make(state, states, batch, tensors, key)
        except SlotsGrew:
            return None
        except CompileError as error:
            if self.mode is True:
                raise
            self._go_on_in_eager(f"the step cannot be compiled: {error}")
            return None
        if self.mode == "auto" and self.figures.form == "undecided":
            self._choose(graph, state, batch)
            if self._eager:
                return None
        elif self.figures.form == "undecided":
            self.figures = attrs.evolve(self.figures, form="compiled", reason="compiling was asked for")
        self._use(graph, states, key)
        return graph

    def _use(self, graph: CompiledGraph, states: Sequence[TrainState], key: Any) -> None:
        self._current[key] = graph
        if not self._bound.holds(states):
            self._bound.take(states, same_tensors=False)

    def _worth_compiling(self, states: list[TrainState], key: Any) -> bool:
        """Whether to make a graph now; a run's first step, which makes the slots, runs eagerly."""
        if any(s.attempted_steps == 0 and not any(s.tensors.slots.values()) for s in states):
            return False
        if key in self._graphs or not self._graphs:
            return True
        self._seen[key] = self._seen.get(key, 0) + 1
        if self._seen[key] < _COMPILED_WHEN_SEEN:
            return False
        if (
            len(self._graphs) >= _USUAL_SHAPES
            and self._seen[key] == _COMPILED_WHEN_SEEN
            and not self._gave_up
        ):
            self._gave_up = len(self._graphs) >= _MOST_SHAPES
            shapes = "; ".join(describe(known) for known in (*self._graphs, key))
            then = "one more is run in eager" if self._gave_up else "each costs a graph"
            warnings.warn(
                f"steploop.compile: batches of {len(self._graphs) + 1} shapes have come ({shapes}); {then}. Pad them to one "
                "or two shapes, or drop the short last batch.",
                stacklevel=4,
            )
        return len(self._graphs) < _MOST_SHAPES

    def _make(
        self, state: Any, states: list[TrainState], batch: Any, tensors: list[Tensor], key: Any
    ) -> CompiledGraph:
        """Trace and compile; reuse an equal graph that is already compiled."""
        check_torch()
        names = [""] if isinstance(state, TrainState) else list(state)
        self._report(f"compiling the train step for a batch of {describe(key)}")
        begin = time.perf_counter()
        try:
            plan = trace_step(
                self.train_step, dict(zip(names, states, strict=True)), batch, tensors, cycled=False
            )
        except SlotsGrew:
            raise
        except Exception as error:
            raise diagnosed(error) from error
        run = self._compiled_before(plan) or compile_graph(plan.graph, plan.mode)
        seconds = time.perf_counter() - begin
        graph = CompiledGraph(plan, run, names, states)
        self._graphs.setdefault(key, []).append(graph)
        self.figures = attrs.evolve(self.figures, compile_s=(*self.figures.compile_s, seconds))
        self._report(f"compiling: {seconds:.0f} s")
        return graph

    def _compiled_before(self, plan: StepPlan) -> Run | None:
        for graphs in self._graphs.values():
            for graph in graphs:
                if graph.plan.graph.text == plan.graph.text:
                    return graph.run
        return None

    # -- mode="auto" ---------------------------------------------------------------------------------------------

    def _choose(self, graph: CompiledGraph, state: Any, batch: Any) -> None:
        """Choose the faster form, by a few steps of each on clones of the state."""
        bound = Bound()

        def compiled(one: Any, batch: Any) -> Any:
            states = [one] if isinstance(one, TrainState) else list(one.values())
            if not bound.holds(states):
                bound.take(states, same_tensors=False)
            new = graph(bound, states, flatten(batch)[0])
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

    # -- failures ------------------------------------------------------------------------------------------------

    def _raise_nonfinite(
        self, state: Any, states: list[TrainState], new: list[TrainState], batch: Any
    ) -> None:
        """Repeat the skipped step eagerly, to name the gradient that is not finite."""
        again = [
            n.clone().replace(
                attempted_steps=s.attempted_steps,
                batch=s.batch,
                nonfinite_steps=s.nonfinite_steps,
                scale=s.scale,
            )
            for s, n in zip(states, new, strict=True)
        ]
        self.train_step(
            again[0] if isinstance(state, TrainState) else dict(zip(state, again, strict=True)), batch
        )
        raise NonFiniteError(
            f"{max(int(n.nonfinite_steps) for n in new)} steps in a row had gradients that were not finite when compiled; in eager "
            "the last one is finite. Lower the learning rate, clip, or train without compiling."
        )
