"""Checkpoints of a run: what the loop gives to be kept goes to a store, and a resume begins with the newest."""

import warnings
from collections.abc import Callable
from pathlib import Path

from steploop.checkpoint import CheckpointStore
from steploop.checkpoint.store import step_of
from steploop.recipe import State
from steploop.run.states import attempted_steps, lead

__all__ = ["CheckpointKeeper"]


class CheckpointKeeper:
    """Keeps the newest states of one phase of a run, and the best one.

    Args:
        directory: of the checkpoints; made if it is missing, and cleared of what crashed runs left in it.
        on_saved: told of each: the checkpoint's directory, and whether it is the best.

    Raises:
        CheckpointWriteError: no checkpoint can be written there.
    """

    def __init__(self, directory: Path, on_saved: Callable[[Path, bool], None] = lambda *_: None) -> None:
        self._store = CheckpointStore(directory, background=True)
        self._store.prepare()
        self._on_saved = on_saved
        self._saved: tuple[int, int, int] | None = None

    def save(self, state: State, *, best: bool) -> None:
        """Keep the state, unless it was the last one kept; it is copied here and written while training goes on.

        Raises:
            CheckpointWriteError: the one before could not be written.
            NonFiniteError: a trained parameter of the one before was not finite.
        """
        first = lead(state)
        place = (attempted_steps(state), first.epoch, first.batch)
        if place != self._saved:
            self._store.save(state, best=best)
            self._saved = place
            self._on_saved(self._store.path(step_of(state)), best)

    def newest(self, like: State, *, require_exact: bool, note: Callable[[str], None]) -> State | None:
        """The newest state that is whole, or None where none was kept; warnings become notes.

        Raises:
            CheckpointError: there are some, but none is whole, or it does not fit ``like``.
        """
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                state = self._store.load(like=like, require_exact=require_exact)
            finally:
                for warning in caught:
                    note(f"warning: {warning.message}")
        if state is not None:
            first = lead(state)
            self._saved = (attempted_steps(state), first.epoch, first.batch)
        return state

    def close(self) -> None:
        """Return once the last one is on the disk.

        Raises:
            CheckpointWriteError: it could not be written.
            NonFiniteError: a trained parameter in it is not finite.
        """
        self._store.wait()
