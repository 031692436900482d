"""Save a state: take it apart, write temporary files, flush them, rename."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from steploop.checkpoint.finiteness import refuse_nonfinite
from steploop.checkpoint.format.manifest import MANIFEST, Manifest
from steploop.checkpoint.format.tensor_files import FileRecord, hash_tensors, write_tensors
from steploop.checkpoint.packing import Collected, collect, named_members
from steploop.checkpoint.provenance import ENVIRONMENT, environment_bytes
from steploop.checkpoint.storage.commit import commit, write_bytes, write_file
from steploop.checkpoint.storage.local import LOCAL, FileWriter, Fs
from steploop.core.state.several import State
from steploop.errors import CheckpointWriteError

__all__ = ["digest", "save", "write_collected"]


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
    return write_collected(
        LOCAL,
        Path(directory),
        collect(state, frozen=frozen),
        device_of(state),
        overwrite=overwrite,
        require_finite=require_finite,
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
    if not target.name or target.name.startswith("."):
        raise CheckpointWriteError(
            f"{target} cannot be a checkpoint: its name must not begin with a dot, which marks unfinished ones. "
            "Give it another name."
        )
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
    computed is not.

    Raises:
        CheckpointUnsupportedError: the state holds something that a checkpoint cannot.
        SpentStateError: the state gave its tensors away.
        StepOrderError: it holds gradients that no optimizer step has used.

    Example:
        >>> checkpoint.digest(state) == checkpoint.digest(state.clone())
        True
    """
    collected = collect(state)
    files = {
        file: hash_tensors(tensors, collected.specs[file], collected.metadata[file])
        for file, tensors in collected.tensors.items()
    }
    return _manifest(collected, files).seal()[1]
