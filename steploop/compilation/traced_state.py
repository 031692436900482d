"""A state of fake tensors that records which plain values a train step reads."""

from collections.abc import Callable
from typing import Any

from steploop.core.state.parts import plain_names
from steploop.core.state.trace import Trace, TracedCount
from steploop.core.state.train_state import TrainState

__all__ = ["Notes", "OwnedCount", "TracedState", "traced_class", "untraced_names"]


class Notes:
    """The plain values that a trace read; its graph is valid for these only."""

    def __init__(self) -> None:
        self.reads: dict[tuple[str, str], Any] = {}

    def note(self, owner: str, path: str, value: Any) -> Any:
        """Record that ``path`` of the state ``owner`` was read with this value; return it."""
        self.reads[owner, path] = value
        return value


class OwnedCount(TracedCount):
    """A counter that knows its state and where reads of that state are recorded."""

    __slots__ = ("notes", "owner")

    def __init__(self, trace: Trace, name: str, owner: str, notes: Notes, offset: int = 0) -> None:
        super().__init__(trace, name, offset)
        self.owner = owner
        self.notes = notes

    def __add__(self, more: int) -> "OwnedCount":
        return OwnedCount(self.trace, self.name, self.owner, self.notes, self.offset + more)

    __radd__ = __add__


class _Watched:
    """Wraps a small record, such as the plateau's, and records which fields are read."""

    def __init__(self, record: Any, note: Callable[[str, Any], Any]) -> None:
        self.record = record
        self.note = note

    def __getattr__(self, name: str) -> Any:
        return self.note(name, getattr(self.record, name))


def _noting(field: str) -> property:
    """A property that records reads; it overrides the instance's dictionary."""

    def read(state: TrainState) -> Any:
        value = state.__dict__[field]
        count: OwnedCount = state.__dict__["attempted_steps"]
        if value is None or isinstance(value, (int, float, str)):
            return count.notes.note(count.owner, field, value)
        return _Watched(value, lambda part, found: count.notes.note(count.owner, f"{field}.{part}", found))

    def write(state: TrainState, value: Any) -> None:
        state.__dict__[field] = value.record if isinstance(value, _Watched) else value

    return property(read, write)


class TracedState(TrainState):
    """A state with fake tensors and unknown counters; every other read is recorded."""


# Plain values that a graph takes as inputs, or that decide which graph it is.
_TRACED = {"hyper", "batch", "attempted_steps", "applied_steps", "nonfinite_steps", "scale"}
_OF_THE_GRAPH = {"precision"}


def untraced_names(kind: type[TrainState]) -> list[str]:
    """The plain values of a class of states that are no inputs of a graph."""
    return [name for name in plain_names(kind) if name not in _TRACED]


def traced_class(kind: type[TrainState]) -> type[TracedState]:
    """The class of traced states of this class; its properties stand in the places of fields, which live on in the dictionary."""
    watched = {name: _noting(name) for name in untraced_names(kind) if name not in _OF_THE_GRAPH}
    return type(f"Traced{kind.__name__}", (TracedState, kind), watched)
