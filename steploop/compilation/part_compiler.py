"""Compile the pass of one part of a batch: what a compiled step does where a state has ranks.

The whole step as one graph would sum the parts of a batch in another order, and a graph of four parts need not compute
each of them as a graph of one part does. So each part's pass, forward and backward, is compiled by itself, by torch.compile:
the same code for the same part, whoever computes it. What ranks tell each other, the sums, the clipping and the update stay
those of eager: the state is the same on all ranks, also where one of them computes a part in eager.
"""

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from steploop.compilation.inductor import check_compiler
from steploop.core.state.seeding import python_mark
from steploop.core.steps.objectives import Objective
from steploop.core.trees import shapes
from steploop.errors import CompileError

__all__ = ["PartCompiler"]

_MOST_GRAPHS = 16  # of one step: beyond, each new one is a sign that something changes at every step


def _run(objective: Objective, model: Any, batch: Any) -> Any:
    """What is compiled: torch.compile looks at the objective's code and what it reads, so it may be made anew at each step."""
    return objective(model, batch)


class PartCompiler:
    """Puts compiled passes in the place of those of eager.

    Args:
        required: raise CompileError for a pass that cannot be compiled; else it is computed in eager.
        compiled: is called after each compilation with what for, and the seconds.

    Attributes:
        refused: why passes are computed in eager: by objective and shapes.
    """

    def __init__(self, *, required: bool, compiled: Callable[[str, float], object]) -> None:
        self.refused: dict[tuple[Any, str], str] = {}
        self._required = required
        self._tell = compiled
        self._functions: dict[
            bool, Any
        ] = {}  # by whether graphs are kept; of a step that keeps none there is one

    def __call__(self, objective: Objective, *, keep_graph: bool) -> Objective:
        """The objective compiled; it raises what the objective raises."""

        def compiled(model: Any, batch: Any) -> Any:
            if self.refused and (_code(objective), shapes(batch)) in self.refused:
                return objective(model, batch)
            return self._compute(objective, model, batch, keep_graph=keep_graph)

        return compiled

    def _compute(self, objective: Objective, model: Any, batch: Any, *, keep_graph: bool) -> Any:
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
        from torch._dynamo.utils import counters
        from torch._inductor.exc import InductorError

        function = self._functions.get(keep_graph)
        if function is None:
            check_compiler(next(p.device for p in model.parameters()))
            function = self._functions[keep_graph] = _compiled(keep_graph=keep_graph)
        graphs, mark = counters["stats"]["unique_graphs"], python_mark()
        begin = time.perf_counter()
        failure = None
        try:
            with nullcontext() if len(self._functions) == 1 else _quiet():
                result = function(objective, model, batch)
        except (TorchDynamoException, FailOnRecompileLimitHit, InductorError) as error:
            failure = error
        if failure is not None:
            result = objective(model, batch)  # what is wrong in eager too is said as there
            self._refuse(objective, batch, failure)
        elif python_mark() != mark:
            # torch 2.14 compiles random.random() into numbers that are none of Python's
            raise CompileError(
                "A pass of a step with ranks draws from Python's random, which cannot be compiled. Draw with torch (torch.rand(())), "
                "give the number with the batch, or train without compiling."
            )
        if counters["stats"]["unique_graphs"] != graphs:
            self._tell(shapes(batch), time.perf_counter() - begin)
        return result

    def _refuse(self, objective: Objective, batch: Any, error: Exception) -> None:
        why = _reason(error)
        if self._required:
            raise CompileError(
                f"A pass of a step with ranks cannot be compiled, for a part of {shapes(batch)}: {why} Or train without compiling."
            ) from error
        self.refused[_code(objective), shapes(batch)] = why


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.compile asks a batch that another pass has made for its gradient, and torch warns of that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        yield


def _compiled(*, keep_graph: bool) -> Callable[..., Any]:
    """``_run`` compiled for the forms of batches that come; each is a graph of its own, whatever came before."""
    found: Callable[..., Any] = torch.compile(  # type: ignore[call-overload]  # torch's overloads lack its last parameters
        _run,
        fullgraph=True,
        dynamic=False,
        options={"fallback_random": True},  # torch's own generators: the numbers that eager draws
        recompile_limit=_MOST_GRAPHS,
        isolate_recompiles=True,
    )
    if not keep_graph:
        return found
    from torch._functorch import config

    def kept(*arguments: Any) -> Any:
        with config.patch(donated_buffer=False):  # its memory is needed by another backward pass
            return found(*arguments)

    return kept


def _code(objective: Any) -> Any:
    return getattr(objective, "__code__", objective)


def _reason(error: Exception) -> str:
    """What torch says, in a line or two."""
    from torch._dynamo.exc import FailOnRecompileLimitHit

    if isinstance(error, FailOnRecompileLimitHit):
        return (
            f"{_MOST_GRAPHS} graphs were made, and what the objective reads is new again. Pad tensors to few shapes, and make numbers "
            "that change tensors (a buffer, part of the batch)."
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else type(error).__name__
    hints = [line for line in lines[1:] if line.startswith(("Explanation:", "Hint:"))][:2]
    return " ".join(line.rstrip(".") + "." for line in (first[:300], *hints))
