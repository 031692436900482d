"""What the step functions need to know of a state that is being traced: its counters are known only when the graph runs."""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

__all__ = ["Trace", "TracedCount", "trace_of"]


class Trace(Protocol):
    """What a trace does for a step function whose work the host has to do before or after the graph."""

    def schedule(self, state: Any, learning_rate: Any) -> Any:
        """The state whose rates the host will set, when it knows how many steps were taken."""
        ...

    def value_at_step(self, state: Any, function: Callable[[int], float]) -> Tensor:
        """``function(applied_steps)`` as a tensor of shape () that the host fills before the graph runs."""
        ...

    def limit_nonfinite(self, state: Any, limit: int) -> None:
        """Note how many steps in a row may be not finite: the host counts them."""
        ...

    def generators(self, state: Any) -> Any:
        """What stands in for ``SeededGenerators``: notes where a pass of the state is seeded."""
        ...

    def counts(self, state: Any, finite: Tensor) -> dict[str, Any]:
        """The counters of the state after a step that is taken where ``finite``."""
        ...


class TracedCount:
    """``attempted_steps`` of a state that is being traced.

    Attributes:
        trace: the trace that the state belongs to.
    """

    __slots__ = ("trace",)

    def __init__(self, trace: Trace) -> None:
        self.trace = trace


def trace_of(state: Any) -> Trace | None:
    """The trace that a state belongs to; None outside of compilation."""
    count = state.attempted_steps
    return count.trace if isinstance(count, TracedCount) else None
