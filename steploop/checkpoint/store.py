"""Keep a directory of checkpoints, one for each saved step: find the newest, keep the best.

Order is that of the steps as numbers, never of names or clocks. Nothing points at the newest one; it is found.
"""

import itertools
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from steploop.checkpoint.background import BackgroundSaver
from steploop.checkpoint.loading import load_from
from steploop.checkpoint.opening import Checkpoint, open_checkpoint
from steploop.checkpoint.packing import named_members
from steploop.checkpoint.rank_loading import open_on_ranks
from steploop.checkpoint.saving import save_state
from steploop.checkpoint.storage.commit import OLD, find, write_error
from steploop.checkpoint.storage.litter import discard, make_directories, probe, sweep
from steploop.checkpoint.storage.local import LOCAL, Fs
from steploop.checkpoint.votes import Votes, votes_of
from steploop.core.ranks import Ranks
from steploop.core.state.several import State
from steploop.errors import CheckpointDamagedError, ConfigError

__all__ = ["CheckpointStore", "DamagedCheckpointWarning", "step_of"]

_STEP: Final = re.compile(r"step-(\d{12,16})")
_LEAST: Final = 2  # the last one may be the one that is damaged


class DamagedCheckpointWarning(UserWarning):
    """A checkpoint was damaged and renamed; an older one is used.

    Example:
        >>> import warnings
        >>> warnings.simplefilter("error", checkpoint.DamagedCheckpointWarning)  # stop instead of using an older one
    """


def step_of(state: State) -> int:
    """Return the number of optimizer steps taken, by the first of several states."""
    return next(iter(named_members(state).values())).step


class CheckpointStore:
    """The checkpoints of one run, as ``step-000000001234/`` in one directory.

    Args:
        directory: of the checkpoints.
        keep: how many of the newest to keep, >= 2; the best one is kept as well.
        background: write in a thread while training goes on (see ``BackgroundSaver``).
        frozen: False leaves out the parameters that are not trained (see ``save``).
        fs: the storage to write to.
        on_saved: called with each checkpoint's directory once it is on the disk, before older ones are deleted; by the
            thread that saves, of ranks by that of rank 0.

    Raises:
        ConfigError: ``keep`` is less than 2.

    Example:
        >>> store = CheckpointStore(folder, keep=2)
        >>> for batch in batches:
        ...     state = train_step(state, batch)
        ...     store.save(state)
        >>> store.steps()
        [3, 4]
        >>> store.load(like=state).step
        4
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        keep: int = 3,
        background: bool = False,
        frozen: bool = True,
        fs: Fs = LOCAL,
        on_saved: Callable[[Path], None] | None = None,
    ) -> None:
        if not isinstance(keep, int) or keep < _LEAST:
            raise ConfigError(
                f"CheckpointStore: keep must be an int >= {_LEAST}, but is {keep!r}: a single checkpoint that is damaged "
                "would leave nothing."
            )
        self.directory = Path(directory)
        self._keep = keep
        self._frozen = frozen
        self._fs = fs
        self._best: int | None = None
        self._target: Path | None = None
        self._on_saved = on_saved
        self._saver = BackgroundSaver(fs=fs, after=self._after, frozen=frozen) if background else None

    def prepare(self, *, ranks: Ranks | None = None) -> list[str]:
        """Create the directory, check that it is writable, and remove what crashed runs left.

        Call it before the first step, with the run locked.

        Args:
            ranks: those that will save here, every one of which calls this; rank 0 does it.

        Returns:
            The names of what was removed.

        Raises:
            CheckpointWriteError: no checkpoint can be written here; ``errno`` says why.
        """
        votes = Votes(ranks)
        return votes.agreed(self._prepare) if votes.leads else votes.agreed(list)

    def _prepare(self) -> list[str]:
        make_directories(self._fs, self.directory)
        probe(self._fs, self.directory)
        return sweep(self._fs, self.directory)

    def path(self, step: int) -> Path:
        """Return the path of a step's checkpoint, whether it exists or not."""
        return self.directory / f"step-{step:012d}"

    def steps(self) -> list[int]:
        """List the steps that have a checkpoint, in order, without verifying them; those that a crash left set aside too."""
        names = (_STEP.fullmatch(name.removeprefix(OLD)) for name in self._fs.names(self.directory))
        return sorted(
            {int(match[1]) for match in names if match and self.path(int(match[1])).name == match[0]}
        )

    def save(self, state: State, *, best: bool = False) -> None:
        """Save a state as the checkpoint of its step; replace an earlier one of that step.

        Older ones are deleted once this one is on the disk: all but the newest ``keep`` and the best.

        Args:
            state: one, or several by name.
            best: this is the best so far. Otherwise the step of ``state.best`` is the best one.

        Raises:
            CheckpointWriteError: it could not be written; in the background: the one before it could not.
            NonFiniteError: a trained parameter is not finite; in the background: of the one before it.
        """
        self.wait()
        lead = next(iter(named_members(state).values()))
        if best:
            self._best = step_of(state)
        elif lead.best is not None:
            self._best = lead.best.step
        self._target = target = self.path(step_of(state))
        if self._saver is not None:
            self._saver.save(state, target, overwrite=True)
        else:
            save_state(self._fs, state, target, frozen=self._frozen, after=self._after, overwrite=True)

    def wait(self) -> None:
        """Wait until every save is on the disk.

        Raises:
            CheckpointWriteError: the last save failed.
        """
        if self._saver is not None:
            self._saver.wait()

    def _after(self) -> None:
        if self._on_saved is not None and self._target is not None:
            self._on_saved(self._target)
        self._prune()

    def _prune(self) -> None:
        steps = self.steps()
        for step in steps[: -self._keep]:
            if step != self._best:
                try:
                    discard(self._fs, self.path(step))
                except OSError as error:
                    raise write_error(f"{self.path(step)} could not be deleted", error) from error

    def load(
        self,
        *,
        like: State,
        step: int | None = None,
        migrate: Mapping[str, str | None] | None = None,
        require_exact: bool = False,
    ) -> State | None:
        """Load the newest checkpoint that verifies, or that of one step; None if there is none.

        A damaged newest one is renamed to ``.corrupt-...`` with a warning, and the next older one is taken. One
        that is asked for by its step has to be whole.

        Args:
            like: see ``steploop.checkpoint.load``.
            step: None for the newest.
            migrate: see ``steploop.checkpoint.load``.
            require_exact: see ``steploop.checkpoint.load``.

        Raises:
            CheckpointDamagedError: the one of ``step`` is missing or damaged, or all there are.
            CheckpointIncompatibleError: it does not fit ``like``.
            CheckpointVersionError: it is of a format that this version does not read.
        """
        votes = votes_of(like)

        def opened(path: Path) -> Checkpoint:
            if votes is None:
                return open_checkpoint(path, fs=self._fs)
            return open_on_ranks(path, like=like, votes=votes, fs=self._fs)

        checkpoint = self._newest(votes or Votes(), opened) if step is None else opened(self.path(step))
        if checkpoint is None:
            return None
        return load_from(checkpoint, like=like, migrate=migrate, require_exact=require_exact, votes=votes)

    def newest(self) -> Checkpoint | None:
        """Read the newest checkpoint that verifies, in one process; None if there is none at all.

        Raises:
            CheckpointDamagedError: there are some, and none verifies. Beginning anew is for the caller to decide.
            CheckpointVersionError: the newest is of a format that this version does not read.
        """
        return self._newest(Votes(), lambda path: open_checkpoint(path, fs=self._fs))

    def _newest(self, votes: Votes, opened: Callable[[Path], Checkpoint]) -> Checkpoint | None:
        steps: list[int] = votes.from_first({"steps": self.steps() if votes.leads else None})["steps"]
        for step in reversed(steps):
            try:
                return opened(self.path(step))
            except CheckpointDamagedError as error:
                aside = votes.agreed(lambda: self._put_aside(self.path(step)) if votes.leads else None)  # noqa: B023
                if aside is not None:
                    warnings.warn(
                        f"{error} It was renamed to {aside.name}.", DamagedCheckpointWarning, stacklevel=4
                    )
        if steps:
            raise CheckpointDamagedError(
                f"None of the {len(steps)} checkpoints in {self.directory} verifies. They were renamed to .corrupt-*; to "
                "begin anew, choose another directory."
            )
        return None

    def _put_aside(self, path: Path) -> Path:
        taken = self._fs.names(self.directory)
        names = (f".corrupt-{path.name}" + (f"-{n}" if n else "") for n in itertools.count())
        aside = path.with_name(next(name for name in names if name not in taken))
        try:
            self._fs.rename(find(self._fs, path), aside)
            self._fs.sync_directory(self.directory)
        except OSError as error:
            raise write_error(f"The damaged checkpoint {path} could not be renamed", error) from error
        return aside
