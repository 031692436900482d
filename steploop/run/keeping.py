"""Checkpoints of a run: the newest ones, the best one, and where a resume begins."""

from steploop.recipe import State

__all__ = ["NoCheckpoints"]


class NoCheckpoints:
    """A keeper that keeps nothing."""

    def save(self, state: State, *, best: bool) -> None:
        """Nothing."""
