"""Keep the graphs of a step, by the form of batch; decide whether another one is worth its time.

What is decided depends on the forms that came before, so a run writes them down: a resume decides as it would have.
"""

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from steploop.compilation.bound_states import Bound
from steploop.compilation.flattening import describe
from steploop.compilation.graph_calls import CompiledGraph
from steploop.compilation.host_numbers import Now
from steploop.compilation.plans import StepPlan
from steploop.compilation.repeated_parts import Run
from steploop.compilation.step_trace import MOST_GRAPHS
from steploop.core.state.train_state import TrainState

__all__ = ["GraphStore"]

_COMPILED_WHEN_SEEN = (
    3  # a shape other than the first is compiled when it comes for this time: a last batch costs no graph
)
_USUAL_SHAPES = 2  # more shapes than this are compiled with a warning,
_MOST_SHAPES = 8  # and more than this run in eager
_MOST_FORMS = 256  # that are remembered
_MOST_TRACES = 64  # for one form of batch, where most of them share a compiled graph


class GraphStore:
    """The graphs of one step.

    Attributes:
        current: form of a batch -> the graph that ran last for it.
    """

    def __init__(self) -> None:
        self.current: dict[Any, CompiledGraph] = {}
        self._graphs: dict[Any, list[CompiledGraph]] = {}
        self._seen: dict[
            str, int
        ] = {}  # form of a batch -> how often it came; the first one counts as usual at once
        self._tell: Callable[[str, int, int], object] = lambda *_: None
        self._many: set[Any] = set()  # forms for which too many graphs were made
        self._endless = False
        self._gave_up = False  # more shapes than are worth a graph have come

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self._graphs)

    def remember(self, seen: Mapping[str, int], tell: Callable[[str, int, int], object]) -> None:
        """Go on counting forms of batches.

        Args:
            seen: form -> how often it came before.
            tell: called with a form, how often it has come, and the attempted step (from 1), where that decides anything.
        """
        self._seen.update(seen)
        self._tell = tell

    def all(self) -> list[CompiledGraph]:
        """Every graph, in the order in which they were made for each form of batch."""
        return [graph for graphs in self._graphs.values() for graph in graphs]

    def add(self, key: Any, graph: CompiledGraph) -> None:
        """Keep a graph."""
        self._graphs.setdefault(key, []).append(graph)

    def find(self, key: Any, now: Now, bound: Bound) -> CompiledGraph | None:
        """The graph for batches of this form that may run now."""
        for graph in self._graphs.get(key, ()):
            if graph.fits(now.states, bound) and graph.holds(now):
                self.current[key] = graph
                return graph
        return None

    def compiled_before(self, plan: StepPlan) -> Run | None:
        """An equal graph that is compiled already."""
        return next(
            (graph.run for graph in self.all() if graph.plan.graph.outline.text == plan.graph.outline.text),
            None,
        )

    def worth_compiling(self, states: Sequence[TrainState], key: Any) -> bool:
        """Whether to make a graph now; a run's first steps, until the optimizer has made its slots, run eagerly."""
        if any(not any(s.tensors.slots.values()) and s.step == 0 for s in states):
            return False
        if key in self._graphs:
            return self._few_branches(key)
        form = hashlib.sha256(repr(key).encode("utf-8", "backslashreplace")).hexdigest()[:16]
        seen = self._seen.get(form, 0 if self._seen else _COMPILED_WHEN_SEEN - 1)
        if seen >= _COMPILED_WHEN_SEEN:  # in an earlier process
            return True
        if self._gave_up:
            return False
        if len(self._seen) >= _MOST_FORMS and form not in self._seen:
            if not self._endless:
                self._endless = True
                warnings.warn(
                    f"steploop.compile: batches of {_MOST_FORMS} forms have come, most of them once; new ones run in eager. Leave texts "
                    "and objects that differ from batch to batch out of the batch, and pad tensors to few shapes.",
                    stacklevel=5,
                )
            return False
        compiled = sum(count >= _COMPILED_WHEN_SEEN for count in self._seen.values())
        comes_often = seen + 1 >= _COMPILED_WHEN_SEEN
        self._gave_up = comes_often and compiled >= _MOST_SHAPES
        if not self._gave_up:
            self._seen[form] = seen + 1
            self._tell(form, seen + 1, max(s.attempted_steps for s in states) + 1)
        if comes_often and compiled >= _USUAL_SHAPES:
            shapes = "; ".join(describe(known) for known in (*self._graphs, key))
            then = "one more is run in eager" if self._gave_up else "each costs a graph"
            warnings.warn(
                f"steploop.compile: batches of {len(self._graphs) + 1} shapes have come ({shapes}); {then}. Pad them to one "
                "or two shapes, or drop the short last batch.",
                stacklevel=5,
            )
        return comes_often and not self._gave_up

    def _few_branches(self, key: Any) -> bool:
        """Whether few enough graphs have been made for batches of one form, for other values that Python reads."""
        graphs = self._graphs[key]
        if len(graphs) < _MOST_TRACES and len({id(graph.run) for graph in graphs}) < MOST_GRAPHS:
            return True
        if key not in self._many:
            self._many.add(key)
            last = graphs[-1]
            names = dict.fromkeys([*last.baked.changed(), *(guard.name for guard in last.plan.guards)])
            warnings.warn(
                f"steploop.compile: {len(graphs)} graphs were made for one form of batch, because what Python reads in the step "
                f"takes ever new values ({', '.join(list(names)[:5]) or 'hyperparameters'}); the next ones run in eager. Make it a "
                "tensor (a buffer, state.carry, part of the batch), or let it take few values.",
                stacklevel=5,
            )
        return False
