"""Keep the checkpoints of a run, and say which are on the disk."""

from collections.abc import Callable
from pathlib import Path

from steploop.checkpoint import CheckpointStore
from steploop.checkpoint.store import step_of
from steploop.core.ranks import Ranks
from steploop.core.state.several import State
from steploop.runs.members import attempted_steps, lead

__all__ = ["CheckpointKeeper"]


class CheckpointKeeper:
    """Keeps the newest states of one phase of a run, and the best one.

    Args:
        directory: of the checkpoints; made if it is missing, and cleared of what crashed runs left in it.
        on_saved: called with the newest checkpoint's directory, and that of the best one or None, when a run goes on and
            whenever one is on the disk, before older ones are deleted: what it is told of is there. The thread that saves
            calls it.
        frozen: whether parameters that are not trained are kept too.
        before_save: called before each: what was logged up to there is to be written before it.
        ranks: those that save together, each of which has a keeper.

    Raises:
        CheckpointWriteError: no checkpoint can be written there.
    """

    def __init__(
        self,
        directory: Path,
        on_saved: Callable[[Path, Path | None], None] = lambda *_: None,
        before_save: Callable[[], None] = lambda: None,
        *,
        frozen: bool = True,
        ranks: Ranks | None = None,
    ) -> None:
        self._store = CheckpointStore(directory, background=True, frozen=frozen, on_saved=self._tell)
        self._store.prepare(ranks=ranks)
        self._on_saved = on_saved
        self._before_save = before_save
        self._saved: tuple[object, ...] | None = None
        self._best: Path | None = None

    def save(self, state: State, *, best: bool) -> None:
        """Keep the state, unless it was the last one kept; it is copied here and written while training goes on.

        Raises:
            CheckpointWriteError: the one before could not be written.
            NonFiniteError: a trained parameter of the one before was not finite.
        """
        place = _place(state)
        if place != self._saved:
            self._before_save()
            self._store.wait()  # whoever is told of the one before is told of its best one
            self._best = self._best_of(state)
            self._store.save(state, best=best)
            self._saved = place

    def _best_of(self, state: State) -> Path | None:
        best = lead(state).best
        return None if best is None else self._store.path(best.step)

    def _tell(self, saved: Path) -> None:
        self._on_saved(saved, self._best if self._best is not None and self._best.is_dir() else None)

    def goes_on_from(self, state: State) -> None:
        """Note that the state is kept already: it was loaded from here. A kill may have come before it was told."""
        self._saved = _place(state)
        self._best = self._best_of(state)
        self._tell(self._store.path(step_of(state)))

    def settle(self) -> None:
        """Return once the last one is on the disk.

        Raises:
            CheckpointWriteError: it could not be written.
            NonFiniteError: a trained parameter in it is not finite.
        """
        self._store.wait()


def _place(state: State) -> tuple[object, ...]:
    """Where a state stands in its run: steps, cursor, and what its evaluations have decided so far."""
    first = lead(state)
    folds = first.best, first.early_stopping, first.plateau
    return attempted_steps(state), first.epoch, first.batch, *folds
