"""Checkpoints of a run: the newest ones, the best one, and where a resume begins."""

import warnings
from collections.abc import Callable
from pathlib import Path

from steploop.checkpoint import load, save
from steploop.checkpoint.environment import InexactResumeWarning
from steploop.errors import CheckpointDamagedError
from steploop.recipe import State
from steploop.run.states import attempted_steps, lead

__all__ = ["CheckpointKeeper"]


def _name(number: int) -> str:
    return f"step-{number:012d}"


class CheckpointKeeper:
    """Keeps the states of one phase of a run in a directory.

    Args:
        directory: of the checkpoints; made if it is missing.
        on_saved: told of each checkpoint: its directory, the state's step, and whether it is the best.
    """

    def __init__(
        self, directory: Path, on_saved: Callable[[Path, int, bool], None] = lambda *_: None
    ) -> None:
        self._directory = directory
        self._on_saved = on_saved
        self._saved: tuple[int, int, int] | None = None
        directory.mkdir(exist_ok=True)

    def save(self, state: State, *, best: bool) -> None:
        """Keep the state, unless it was the last one kept."""
        first = lead(state)
        place = (attempted_steps(state), first.epoch, first.batch)
        if place == self._saved:
            return
        target = self._directory / _name(place[0])
        save(state, target, overwrite=True)
        self._saved = place
        self._on_saved(target, place[0], best)

    def newest(self, like: State, *, require_exact: bool, note: Callable[[str], None]) -> State | None:
        """The newest state that can be loaded, or None where none was kept.

        Raises:
            CheckpointError: there are some, but the newest whole one does not fit, or none is whole.
        """
        found = sorted(self._directory.glob("step-*"), key=lambda path: int(path.name[5:]), reverse=True)
        for path in found:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", InexactResumeWarning)
                try:
                    state = load(path, like=like, require_exact=require_exact)
                except CheckpointDamagedError as error:
                    note(f"warning: {error} Going back to the one before.")
                    continue
            for warning in caught:
                note(f"warning: {warning.message}")
            return state
        if found:
            raise CheckpointDamagedError(
                f"None of the {len(found)} checkpoints in {self._directory} is whole."
            )
        return None
