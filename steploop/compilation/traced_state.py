"""A state of fake tensors that records which plain values a train step reads."""

from collections.abc import Callable
from typing import Any

from steploop.core.state.trace import Trace, TracedCount
from steploop.core.state.train_state import TrainState

__all__ = ["Notes", "OwnedCount", "TracedState"]


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
        if value is None or isinstance(value, (int, str)):
            return count.notes.note(count.owner, field, value)
        return _Watched(value, lambda part, found: count.notes.note(count.owner, f"{field}.{part}", found))

    def write(state: TrainState, value: Any) -> None:
        state.__dict__[field] = value.record if isinstance(value, _Watched) else value

    return property(read, write)


class TracedState(TrainState):
    """A state with fake tensors and unknown counters; every other read is recorded."""

    seed = _noting("seed")  # the base class has a field, which lives on in the dictionary
    epoch = _noting("epoch")
    plateau = _noting("plateau")
    early_stopping = _noting("early_stopping")
    best = _noting("best")
