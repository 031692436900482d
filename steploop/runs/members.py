"""One state or several by name, treated alike: cursor, counters, and changes to all of them."""

from collections.abc import Mapping
from typing import Any

from steploop.core.state.several import State
from steploop.core.state.train_state import TrainState
from steploop.errors import StepOrderError

__all__ = [
    "arranged",
    "at_position",
    "attempted_steps",
    "epoch_of",
    "lead",
    "next_epoch",
    "place_of",
    "with_lead",
]


def arranged(state: Any, names: tuple[str, ...]) -> State:
    """What a train step returned, its states in the order in which the run began: the first one leads.

    Args:
        state: one state, or several by name in any order.
        names: of the run's states; ``("",)`` where there is one.

    Raises:
        StepOrderError: it is something else than the states of the run.
    """
    if isinstance(state, TrainState):  # asked first: a look at the abstract Mapping takes four times as long
        if names == ("",):
            return state
    elif isinstance(state, Mapping) and all(isinstance(one, TrainState) for one in state.values()):
        returned = tuple(state)
        if returned == names:
            return state
        if sorted(returned) == sorted(names):
            return {name: state[name] for name in names}
    raise StepOrderError(
        f"train_step must return {_described(names)}, but returned {_described_value(state)}. Return the state that its last "
        "function gives, and every state of the run under its name."
    )


def _described(names: tuple[str, ...]) -> str:
    return "a TrainState" if names == ("",) else f"the states {', '.join(names)}"


def _described_value(state: Any) -> str:
    if isinstance(state, Mapping):
        return f"a mapping of {', '.join(f'{name}: {type(one).__name__}' for name, one in state.items()) or 'nothing'}"
    return "None" if state is None else f"a {type(state).__name__}"


def lead(state: State) -> TrainState:
    """The state that carries the cursor, early stopping and the best metric: the only one, or the first."""
    return next(iter(state.values())) if isinstance(state, Mapping) else state


def with_lead(state: State, **changes: Any) -> State:
    """The state with some plain fields of its lead changed."""
    if not isinstance(state, Mapping):
        return state.replace(**changes)
    name = next(iter(state))
    return {**state, name: state[name].replace(**changes)}


def _all_replaced(state: State, **changes: Any) -> State:
    if isinstance(state, Mapping):
        return {name: one.replace(**changes) for name, one in state.items()}
    return state.replace(**changes)


def attempted_steps(state: State) -> int:
    """Steps tried; of several states, the most that one of them has tried."""
    if isinstance(state, TrainState):  # asked first: a look at the abstract Mapping takes four times as long
        return state.attempted_steps
    return max(one.attempted_steps for one in state.values())


def place_of(state: State) -> dict[str, int]:
    """Where a run stands, for a line of its log.

    Epochs, batches and steps are counted from 1, as in all that a run shows and records: after the first step of all,
    each of them is 1. The cursor of a TrainState counts from 0.
    """
    first = lead(state)
    return {
        "step": first.step, "attempted": attempted_steps(state), "epoch": epoch_of(state), "batch": first.batch,
    }  # fmt: skip


def epoch_of(state: State) -> int:
    """The epoch that the newest step belongs to, counted from 1; 0 before the first step."""
    first = lead(state)
    return first.epoch + (first.batch > 0)


def at_position(state: State, batch: int) -> State:
    """The state with its cursor at ``batch``: a step may call ``optimizer_step`` never, once or often per batch."""
    if isinstance(state, TrainState):
        return state if state.batch == batch else state.replace(batch=batch)
    there = all(one.batch == batch for one in state.values())
    return state if there else _all_replaced(state, batch=batch)


def next_epoch(state: State) -> State:
    """The state with its cursor at the first batch of the next epoch."""
    return _all_replaced(state, epoch=lead(state).epoch + 1, batch=0)
