"""What the step functions need to know of a state that is being traced: its counters are known only when the graph runs."""

from collections.abc import Callable
from typing import Any, NoReturn, Protocol

from torch import Tensor

from steploop.errors import CompileError

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


class TracedCount:
    """``attempted_steps`` or ``batch`` of a state that is being traced: only counting on is possible.

    Attributes:
        trace: the trace that the state belongs to.
        name: of the field.
        offset: how far it was counted on in this step.
    """

    __slots__ = ("name", "offset", "trace")

    def __init__(self, trace: Trace, name: str, offset: int = 0) -> None:
        self.trace = trace
        self.name = name
        self.offset = offset

    def __add__(self, more: int) -> "TracedCount":
        return TracedCount(self.trace, self.name, self.offset + more)

    def __sub__(self, less: int) -> "TracedCount":
        return self + -less

    def __repr__(self) -> str:
        return f"<{self.name}{self.offset:+d}>" if self.offset else f"<{self.name}>"

    def _refuse(self, *_: object) -> NoReturn:
        raise CompileError(
            f"reads state.{self.name} as a number, which is another one at every step, while a graph is captured once. "
            "Give a function of the step to what takes one (schedule, update_ema(decay=...)), or do it outside of "
            "train_step."
        )

    # a counter that a decision depends on cannot be captured: every way of looking at it says so
    __bool__ = __int__ = __float__ = __index__ = __hash__ = _refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __mod__ = __mul__ = __rmul__ = __floordiv__ = __truediv__ = __rtruediv__ = __rsub__ = __pow__ = _refuse
    __radd__ = __add__


def trace_of(state: Any) -> Trace | None:
    """The trace that a state belongs to; None in everyday life."""
    count = state.attempted_steps
    return count.trace if isinstance(count, TracedCount) else None
