"""Save in the background: copy the state at once, write it in a thread.

Training is held up for the copy alone. The copy goes to memory that is kept from one save to the next, because fresh
memory costs several times as much as the copying itself: the first save is slower for it. It takes as much memory
again as the state.
"""

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Self

import attrs
import torch
from torch import Tensor

from steploop.checkpoint.packing import Collected, collect
from steploop.checkpoint.rank_saving import RankSave
from steploop.checkpoint.saving import check_name, device_of, write_collected
from steploop.checkpoint.storage.local import LOCAL, Fs
from steploop.checkpoint.votes import Votes, votes_of
from steploop.core.state.several import State

__all__ = ["BackgroundSaver"]


class BackgroundSaver:
    """Save states in a thread, one at a time and in order, while training goes on.

    Of ranks every rank saves at the same steps. Ranks with a process group of their own wait for each save.

    A failure is raised by the next ``save``, by ``wait`` or at the end of the ``with`` block: in the training loop, as
    the error that ``steploop.checkpoint.save`` would have raised.

    Args:
        fs: where to write; tests put another in its place.
        after: called by the thread after each checkpoint that is on the disk; of ranks by that of rank 0.
        frozen: False leaves out the parameters that are not trained (see ``save``).

    Example::

        with BackgroundSaver() as saver:
            for batch in batches:
                state = train_step(state, batch)
                if state.step % 1000 == 0:
                    saver.save(state, f"checkpoints/step-{state.step:012d}")

    Example:
        >>> with BackgroundSaver() as saver:
        ...     saver.save(state, folder / "half")
        ...     state = train_step(state, batch)  # while the checkpoint is written
    """

    def __init__(
        self, *, fs: Fs = LOCAL, after: Callable[[], None] | None = None, frozen: bool = True
    ) -> None:
        self._fs = fs
        self._frozen = frozen
        self._after = after
        self._kept: dict[tuple[str, str], Tensor] = {}
        self._thread: threading.Thread | None = None
        self._digest: str | None = None
        self._failure: BaseException | None = None

    def save(
        self, state: State, directory: Path | str, *, overwrite: bool = False, require_finite: bool = True
    ) -> None:
        """Wait for the previous save, copy the state, and start writing the copy.

        The state may be trained on, or given away, as soon as this returns.

        Args:
            state: as for ``steploop.checkpoint.save``.
            directory: as for ``steploop.checkpoint.save``.
            overwrite: as for ``steploop.checkpoint.save``.
            require_finite: as for ``steploop.checkpoint.save``; the thread checks it, so that training does not wait.

        Raises:
            CheckpointWriteError: the save *before* this one failed. This one was not begun.
            NonFiniteError: a parameter of the save *before* this one was not finite. This one was not begun.
            CheckpointUnsupportedError: the state holds something that a checkpoint cannot.
            SpentStateError: the state gave its tensors away.
            StepOrderError: it holds gradients that no optimizer step has used.
        """
        self.wait()
        target, device = Path(directory), device_of(state)
        check_name(target)
        how = {"overwrite": overwrite, "require_finite": require_finite}
        votes = votes_of(state)
        if votes is None:
            snapshot = self._snapshot(collect(state, frozen=self._frozen))
            work: Callable[[], str] = partial(self._write_one, target, snapshot, device, **how)
        else:
            save = self._of_ranks(votes, state)
            work = partial(save.write, self._fs, target, device, after=self._after, **how)
        self._thread = threading.Thread(target=self._work, args=(work,), name="steploop-save")
        self._thread.start()
        if votes is not None and not votes.apart:
            self._thread.join()

    def _of_ranks(self, votes: Votes, state: State) -> RankSave:
        """Copy what this rank writes: sharded tensors are put together now, and the thread only writes."""
        save, kept = RankSave.begin(votes, partial(collect, state, frozen=self._frozen)), self._kept
        self._kept = {}
        return save.copied(lambda table, name, tensor: self._copy(kept, table, name, tensor))

    def wait(self) -> str | None:
        """Wait until every save is on the disk; return the last digest, None before the first.

        Raises:
            CheckpointWriteError: the last save failed. It is raised once.
            NonFiniteError: it was refused, because a trained parameter is not finite. It is raised once.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if (failure := self._failure) is not None:
            self._failure = None
            raise failure
        return self._digest

    @property
    def busy(self) -> bool:
        """Whether a save is being written now."""
        return self._thread is not None and self._thread.is_alive()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Wait for the last save; do not replace an error that is being raised."""
        if error is None:
            self.wait()
        elif self._thread is not None:
            self._thread.join()

    def _write_one(self, target: Path, snapshot: Collected, device: torch.device, **how: bool) -> str:
        digest = write_collected(self._fs, target, snapshot, device, **how)
        if self._after is not None:
            self._after()
        return digest

    def _work(self, work: Callable[[], str]) -> None:
        try:
            self._digest = work()
        except BaseException as failure:  # noqa: BLE001  (any failure is raised again in the training loop)
            self._failure = failure

    def _snapshot(self, collected: Collected) -> Collected:
        """Copy the tensors to the host, reusing memory of the same name, dtype and layout."""
        sources, targets = [], []
        tensors: dict[str, dict[str, Tensor]] = {}
        kept, self._kept = self._kept, {}
        for file, table in collected.tensors.items():
            tensors[file] = {}
            for name, tensor in table.items():
                source = tensor.detach().resolve_conj().resolve_neg()
                tensors[file][name] = copy = self._room(kept, file, name, source)
                sources.append(source)
                targets.append(copy)
        torch._foreach_copy_(targets, sources)
        return attrs.evolve(collected, tensors=tensors)

    def _room(self, kept: dict[tuple[str, str], Tensor], file: str, name: str, source: Tensor) -> Tensor:
        """Memory on the host for a copy: that of the copy before, if it is alike."""
        copy = kept.get((file, name))
        if copy is None or not _alike(copy, source):
            copy = torch.empty_like(source, device="cpu")
        self._kept[file, name] = copy
        return copy

    def _copy(self, kept: dict[tuple[str, str], Tensor], file: str, name: str, tensor: Tensor) -> Tensor:
        source = tensor.detach().resolve_conj().resolve_neg()
        return self._room(kept, file, name, source).copy_(source)


def _alike(kept: Tensor, source: Tensor) -> bool:
    same = (kept.shape, kept.dtype) == (source.shape, source.dtype)
    return same and (
        kept.stride() == source.stride() or kept.stride() == torch.empty_like(source, device="meta").stride()
    )
