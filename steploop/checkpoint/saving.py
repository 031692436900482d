"""Save a state: take it apart, write temporary files, flush them, rename."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from steploop.checkpoint.finiteness import refuse_nonfinite
from steploop.checkpoint.format.manifest import MANIFEST, Manifest
from steploop.checkpoint.format.tensor_files import FileRecord, hash_tensors, write_tensors
from steploop.checkpoint.packing import Collected, collect, named_members
from steploop.checkpoint.provenance import ENVIRONMENT, environment_bytes
from steploop.checkpoint.rank_saving import RankSave, rank_digest
from steploop.checkpoint.storage.commit import commit, write_bytes, write_file
from steploop.checkpoint.storage.local import LOCAL, FileWriter, Fs
from steploop.checkpoint.votes import votes_of
from steploop.core.state.several import State
from steploop.errors import CheckpointWriteError

__all__ = ["check_name", "device_of", "digest", "save", "save_state", "write_collected"]


def save(
    state: State,
    directory: Path | str,
    *,
    overwrite: bool = False,
    require_finite: bool = True,
    frozen: bool = True,
) -> str:
    """Save a state, or several by name, as the checkpoint ``directory``.

    When this returns, the checkpoint is on the disk and outlives a power loss; while it runs, and if it fails, there
    is none of that name (or the one that was there). Changes nothing in the state. Needs no more memory than the
    largest tensor that does not lie row-major on the CPU.

    Of a state that has ranks, every rank calls this at the same step, with the same arguments, on a disk that all see: each
    writes the tensors that it owns, and a rank that fails makes it fail on all.

    Args:
        state: between two steps; or a mapping of names to states, stored as ``name.parameter``.
        directory: of the checkpoint itself; its parent exists.
        overwrite: take the place of a checkpoint that has the name.
        require_finite: refuse a state with a nan or an inf in a trained parameter: no run can go on from it,
            and the checkpoint it replaces may be the last good one. Buffers may hold any value.
        frozen: False leaves out the parameters that are not trained (a large model under LoRA): ``load`` takes them from
            ``like``, and refuses other values by their digests.

    Returns:
        The checkpoint's digest: the SHA-256 of its ``state.json``. Equal states have equal digests.

    Raises:
        CheckpointUnsupportedError: the state holds something that a checkpoint cannot; nothing was written.
        NonFiniteError: a trained parameter is not finite; nothing was written.
        CheckpointWriteError: the system refused, three times; ``errno`` says why. Nothing is left of it.
        SpentStateError: the state gave its tensors away.
        StepOrderError: it holds gradients that no optimizer step has used.

    Example:
        >>> digest = checkpoint.save(state, folder / "half")
        >>> sorted(path.name for path in (folder / "half").iterdir())
        ['environment.json', 'model.safetensors', 'optimizer.safetensors', 'state.json']
    """
    return save_state(
        LOCAL, state, Path(directory), overwrite=overwrite, require_finite=require_finite, frozen=frozen
    )


def save_state(
    fs: Fs, state: State, target: Path, *, frozen: bool, after: Callable[[], None] | None = None, **how: Any
) -> str:
    """Like ``save``, to any storage; ``after`` is called when the checkpoint is on the disk, of ranks on rank 0."""
    check_name(target)
    if (votes := votes_of(state)) is not None:
        save = RankSave.begin(votes, partial(collect, state, frozen=frozen))
        return save.write(fs, target, device_of(state), after=after, **how)
    found = write_collected(fs, target, collect(state, frozen=frozen), device_of(state), **how)
    if after is not None:
        after()
    return found


def check_name(target: Path) -> None:
    """Raise CheckpointWriteError if no checkpoint can have that name."""
    if not target.name or target.name.startswith("."):
        raise CheckpointWriteError(
            f"{target} cannot be a checkpoint: its name must not begin with a dot, which marks unfinished ones. "
            "Give it another name."
        )


def device_of(state: State) -> torch.device:
    """Return the device of the state, or of the first of several."""
    return next(iter(named_members(state).values())).device


def write_collected(
    fs: Fs,
    target: Path,
    collected: Collected,
    device: torch.device,
    *,
    overwrite: bool,
    require_finite: bool = True,
    tries: int = 3,
    wait_s: float = 0.5,
) -> str:
    """Write a collected state to the directory ``target`` and return its digest.

    Raises:
        NonFiniteError: a trained parameter is not finite, and ``require_finite``.
        CheckpointWriteError: it could not be written.
    """
    check_name(target)
    if require_finite:
        refuse_nonfinite(collected)

    def write(temporary: Path) -> str:
        files = {
            file: write_file(fs, temporary / file, partial(_fill, collected, file))
            for file in collected.tensors
        }
        text, sha256 = _manifest(collected, files).seal()
        write_bytes(fs, temporary / MANIFEST, text)
        write_bytes(fs, temporary / ENVIRONMENT, environment_bytes(device))
        return sha256

    return commit(fs, target, write, overwrite=overwrite, tries=tries, wait_s=wait_s)


def _fill(collected: Collected, file: str, out: FileWriter) -> FileRecord:
    return write_tensors(out, collected.tensors[file], collected.specs[file], collected.metadata[file])


def _manifest(collected: Collected, files: Mapping[str, FileRecord]) -> Manifest:
    return Manifest(files=files, tensors=collected.specs, state=collected.state, metadata=collected.metadata)


def digest(state: State) -> str:
    """Return the digest that ``save`` would return, without writing; equal states have equal ones.

    Everything a checkpoint holds is in it: parameters, buffers, slots, counters, cursor, folds. Where and when it was
    computed is not, nor on how many ranks. A state that has ranks has another digest than the same values without: that
    of version 2 of the format. Of a sharded one every rank has to ask at the same time.

    Raises:
        CheckpointUnsupportedError: the state holds something that a checkpoint cannot.
        SpentStateError: the state gave its tensors away.
        StepOrderError: it holds gradients that no optimizer step has used.

    Example:
        >>> checkpoint.digest(state) == checkpoint.digest(state.clone())
        True
    """
    if (votes := votes_of(state)) is not None:
        return rank_digest(votes, partial(collect, state))
    collected = collect(state)
    files = {
        file: hash_tensors(tensors, collected.specs[file], collected.metadata[file])
        for file, tensors in collected.tensors.items()
    }
    return _manifest(collected, files).seal()[1]
