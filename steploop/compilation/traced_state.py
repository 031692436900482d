"""A state of fake tensors: what a train step reads of it is an input of the graph, or noted."""

import functools
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

from steploop.compilation.host_numbers import Expression, HostNumber
from steploop.core.state.parts import InFlight, plain_names, result_names
from steploop.core.state.train_state import TrainState
from steploop.errors import CompileError

__all__ = [
    "Owner",
    "TracedState",
    "earlier_class",
    "results_of",
    "traced_class",
    "untraced_names",
    "unwatched",
]


class Owner:
    """The traced state's trace, as this state sees it.

    Attributes:
        trace: of the step.
        name: of the state; "" is that of a single one.
        index: of the state among all.
        real: the state that the trace was made for.
        finite: whether the step has looked at the gradients; then whether it is finite is known.
    """

    def __init__(self, trace: Any, name: str, index: int, real: TrainState) -> None:
        self.trace = trace
        self.name = name
        self.index = index
        self.real = real
        self.prefix = f"state[{name!r}]" if name else "state"

    def number(self, field: str, read: Callable[[TrainState], Any]) -> HostNumber:
        """A number of the state that goes in."""
        return HostNumber(self.trace, self.expression(read), f"{self.prefix}.{field}")

    def expression(self, read: Callable[[TrainState], Any]) -> Expression:
        """How the host reads it."""
        index = self.index
        return lambda now: read(now.states[index])

    def note(self, field: str, read: Callable[[TrainState], Any]) -> Any:
        """A plain value of the state that goes in, noted."""
        return self.number(field, read)._value()  # its public ways of reading are the user's: they refuse


def _asked_by_user() -> bool:
    """Whether a property of a state is read by the user's code: the step functions see the traced value itself."""
    asking = sys._getframe(2).f_globals.get("__name__", "")
    return not asking.startswith(("steploop.", "attr.", "attrs."))


def _owner(state: TrainState) -> Owner:
    found: Owner = state.__dict__["attempted_steps"].owner
    return found


class _Watched:
    """Wraps a small record, such as the plateau's, and notes which fields are read."""

    def __init__(self, record: Any, note: Callable[[str], Any]) -> None:
        self.record = record
        self.note = note

    @property  # type: ignore[misc]  # isinstance() reads it
    def __class__(self) -> Any:
        return type(self.record)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.record, name)
        return found if callable(found) else self.note(name)


def unwatched(value: Any) -> Any:
    """The record itself."""
    return value.record if type(value) is _Watched else value


def _plain(field: str) -> property:
    """A plain value that is read through the trace; it overrides the instance's dictionary."""

    def read(state: TrainState) -> Any:
        value = state.__dict__[field]
        owner = _owner(state)
        if type(value) is int:
            return owner.number(field, lambda real: getattr(real, field))
        if value is None or isinstance(value, (bool, float, str)):
            return owner.note(field, lambda real: getattr(real, field))
        if issubclass(type(value), HostNumber):
            return value
        return _Watched(
            value,
            lambda part: owner.note(
                f"{field}.{part}", lambda real: getattr(getattr(real, field), part, None)
            ),
        )

    def write(state: TrainState, value: Any) -> None:
        state.__dict__[field] = unwatched(value)

    return property(read, write)


class TracedState(TrainState):
    """A state with fake tensors; numbers and records are read through the trace."""

    def _read_hyper(self) -> Any:
        hyper = self.__dict__["hyper"]
        if not _asked_by_user():
            return hyper
        owner = _owner(self)
        return tuple(
            {
                key: owner.note(f"hyper[{i}][{key!r}]", _reader(i, key)) if _holds_tensor(value) else value
                for key, value in group.items()
            }
            for i, group in enumerate(hyper)
        )

    hyper = property(_read_hyper, lambda self, value: self.__dict__.__setitem__("hyper", value))

    def _read_scale(self) -> Any:
        scale = self.__dict__["scale"]
        if scale is None or not _asked_by_user() or not _owner(self).trace.on_host:
            return scale
        owner = _owner(self)
        return _Watched(
            scale, lambda part: owner.note(f"scale.{part}", lambda real: getattr(real.scale, part))
        )

    scale = property(_read_scale, lambda self, value: self.__dict__.__setitem__("scale", unwatched(value)))

    @property
    def learning_rate(self) -> float:
        """The learning rate of the first parameter group, noted."""
        return float(_owner(self).note("learning_rate", lambda real: real.learning_rate))

    @property
    def finite(self) -> Any:
        """Whether all gradients are finite; to the user's code a bool, as in eager, where the host decides."""
        flight, owner = self.__dict__["flight"], _owner(self)
        value = flight.finite
        if not isinstance(value, Tensor) or "note" in flight.__dict__:
            return value
        return owner.trace.finite(owner) if _asked_by_user() and owner.trace.on_host else value

    @property
    def step(self) -> int:
        """Optimizer steps taken, as a number of the host."""
        count: Any = self.applied_steps
        if isinstance(count, Tensor):
            raise CompileError(
                f"reads {_owner(self).prefix}.step, which is counted on the device and known there only. Decide by "
                f"{_owner(self).prefix}.attempted_steps, which the host counts, or give a function of the step to schedule or "
                "update_ema(decay=...)."
            )
        return count  # type: ignore[no-any-return]


def _reader(index: int, key: str) -> Callable[[TrainState], Any]:
    return lambda real: real.hyper[index][key]


def _holds_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (
        isinstance(value, tuple) and any(isinstance(v, Tensor) for v in value)
    )


# Plain values that a graph takes as inputs, or that decide which graph it is.
_TRACED = {"hyper", "batch", "attempted_steps", "applied_steps", "nonfinite_steps", "scale"}
_OF_THE_GRAPH = {"precision"}


def untraced_names(kind: type[TrainState]) -> list[str]:
    """The plain values of a class of states that are no inputs of a graph."""
    return [name for name in plain_names(kind) if name not in _TRACED]


@functools.cache
def traced_class(kind: Any) -> type[TracedState]:
    """The class of traced states of this class; its properties stand in the places of fields, which live on in the dictionary."""
    watched = {name: _plain(name) for name in untraced_names(kind) if name not in _OF_THE_GRAPH}
    return type(f"Traced{kind.__name__}", (TracedState, kind), watched)


def results_of(flight: InFlight) -> list[str]:
    """What a finished step leaves in flight for the next one to read; the counters that the host knows are its own."""
    return [name for name in result_names(type(flight)) if name != "known"]


@functools.cache
def earlier_class(kind: Any) -> type[InFlight]:
    """The class of what the step before left: reading it notes its form, and its tensors are inputs of the graph."""
    names = [name for name in result_names(kind) if name != "known"]
    return type(f"Earlier{kind.__name__}", (kind,), {name: _result(name) for name in names})


def _result(field: str) -> property:
    def read(flight: InFlight) -> Any:
        note = flight.__dict__.get("note")  # gone in what this step's functions make
        if note is not None:
            note(field)
        return flight.__dict__[field]

    return property(read)
