"""One state or several by name (the two networks of a GAN), treated alike."""

from collections.abc import Mapping

from steploop.core.state.train_state import TrainState

__all__ = ["State", "clone", "members"]

# One state, or several by name.
State = TrainState | Mapping[str, TrainState]


def members(state: State) -> dict[str, TrainState]:
    """Name -> state; a single one has the name ``""``."""
    return dict(state) if isinstance(state, Mapping) else {"": state}


def clone(state: State) -> State:
    """Copy one state or several; the copies share no tensor with them.

    Example:
        >>> other = clone(state)
        >>> after = train_step(other, batch)
        >>> state.alive
        True
    """
    return {name: one.clone() for name, one in state.items()} if isinstance(state, Mapping) else state.clone()
