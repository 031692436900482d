"""Load a checkpoint, and verify every byte before using a tensor of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
from torch import Tensor

from steploop.checkpoint.format.manifest import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    Manifest,
    parse_manifest,
    read_small,
)
from steploop.checkpoint.format.tensor_files import read_tensors
from steploop.checkpoint.provenance import ENVIRONMENT, check_environment, read_environment
from steploop.checkpoint.saving import device_of
from steploop.checkpoint.storage.commit import find
from steploop.checkpoint.storage.local import LOCAL, Fs
from steploop.checkpoint.unpacking import restore
from steploop.core.state.several import State
from steploop.errors import CheckpointDamagedError

__all__ = ["Checkpoint", "load", "load_from", "open_checkpoint"]


@attrs.frozen(kw_only=True)
class Checkpoint:
    """A checkpoint that was read and verified.

    Attributes:
        directory: where it is.
        manifest: the content of ``state.json``.
        environment: the content of ``environment.json``: where and when it was written.
        tensors: file name -> tensor name -> tensor, in memory of their own.

    Example:
        >>> saved = checkpoint.save(state, folder / "half")
        >>> checkpoint.open_checkpoint(folder / "half").digest == saved
        True
    """

    directory: Path
    manifest: Manifest
    environment: Mapping[str, Any]
    tensors: Mapping[str, Mapping[str, Tensor]]

    @property
    def digest(self) -> str:
        """The SHA-256 of ``state.json``, and so of the state."""
        return self.manifest.sha256


def open_checkpoint(directory: Path | str, *, fs: Fs = LOCAL) -> Checkpoint:
    """Read a whole checkpoint and verify it.

    Raises:
        CheckpointDamagedError: a file is missing, changed, too long or not steploop's; or there is an extra file.
        CheckpointVersionError: it is of a format that this version does not read.

    Example:
        >>> _ = checkpoint.save(state, folder / "half")
        >>> sorted(checkpoint.open_checkpoint(folder / "half").tensors["model.safetensors"])
        ['0.bias', '0.weight', '2.bias', '2.weight']
    """
    path = find(fs, Path(directory))
    try:
        names = {*fs.names(path)}
    except OSError as error:
        raise CheckpointDamagedError(f"{path} cannot be read: {error}. Use another checkpoint.") from error
    if not names:
        raise CheckpointDamagedError(
            f"There is no checkpoint {directory}. Name a directory that holds a {MANIFEST}."
        )
    manifest = parse_manifest(read_small(fs, path, MANIFEST, limit=MAX_MANIFEST_BYTES), str(path / MANIFEST))
    if others := sorted(names - {MANIFEST, ENVIRONMENT, *manifest.files}):
        raise CheckpointDamagedError(
            f"{path} holds {others[0]!r}, which its manifest does not list. Move it elsewhere."
        )
    environment = read_environment(fs, path)
    tensors = {}
    for name, record in manifest.files.items():
        try:
            file = fs.open(path, name)
            try:
                tensors[name] = read_tensors(
                    file, str(path / name), record, manifest.tensors[name], manifest.metadata[name]
                )
            finally:
                file.close()
        except OSError as error:
            raise CheckpointDamagedError(
                f"{path / name} cannot be read: {error}. Use another checkpoint."
            ) from error
    return Checkpoint(directory=path, manifest=manifest, environment=environment, tensors=tensors)


def load(
    directory: Path | str,
    *,
    like: State,
    migrate: Mapping[str, str | None] | None = None,
    require_exact: bool = False,
) -> State:
    """Load a checkpoint's state onto the model and optimizer of ``like``.

    Every byte is verified first, then everything is compared with ``like`` by name, shape and dtype, and only then
    is a new state built; ``like`` stays as it was in every case. The values are ordinary memory: what becomes of
    the files later does not matter.

    Args:
        directory: of the checkpoint.
        like: a state of the same model and optimizer, such as ``TrainState.create`` gives; or several by name.
            A spent one will do.
        migrate: None: everything has to agree. A mapping says what may differ: saved parameter (or buffer) name ->
            its new name, or None for one that is not loaded and that ``like`` keeps as it has it. Optimizer,
            groups and trained parameters may differ then: values kept per parameter (moments) go with their
            parameter, if the optimizer is of the same class.
        require_exact: refuse to go on in an environment where the last bits may differ, instead of warning.

    Raises:
        CheckpointDamagedError: bytes are missing, changed or hostile.
        CheckpointVersionError: the format is newer or older than this version reads.
        CheckpointIncompatibleError: it does not fit ``like``; lists the first ten differences.

    Example:
        >>> _ = checkpoint.save(train_step(state, batch), folder / "half")
        >>> checkpoint.load(folder / "half", like=TrainState.create(model, optimizer)).step
        1
    """
    return load_from(open_checkpoint(directory), like=like, migrate=migrate, require_exact=require_exact)


def load_from(
    checkpoint: Checkpoint,
    *,
    like: State,
    migrate: Mapping[str, str | None] | None = None,
    require_exact: bool = False,
) -> State:
    """Like ``load``, from a checkpoint that is already read."""
    state = restore(checkpoint.manifest.state, checkpoint.tensors, like, migrate)
    check_environment(checkpoint.environment, device_of(like), require_exact=require_exact)
    return state
