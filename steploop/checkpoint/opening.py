"""Read a checkpoint of either version, and verify every byte of it."""

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
from steploop.checkpoint.format.shard_files import read_shard
from steploop.checkpoint.format.shard_manifest import ShardManifest
from steploop.checkpoint.format.tensor_files import read_tensors
from steploop.checkpoint.provenance import ENVIRONMENT, read_environment
from steploop.checkpoint.storage.commit import find
from steploop.checkpoint.storage.local import LOCAL, Fs
from steploop.errors import CheckpointDamagedError

__all__ = ["AnyManifest", "Checkpoint", "by_table", "open_checkpoint", "read_file", "read_head"]

AnyManifest = Manifest | ShardManifest


@attrs.frozen(kw_only=True)
class Checkpoint:
    """A checkpoint that was read and verified.

    Attributes:
        directory: where it is.
        manifest: the content of ``state.json``, of version 1 or 2.
        environment: the content of ``environment.json``: where and when it was written.
        tensors: "model.safetensors" and "optimizer.safetensors" -> tensor name -> tensor, in memory of their own; however
            many files they stood in.

    Example:
        >>> saved = checkpoint.save(state, folder / "half")
        >>> checkpoint.open_checkpoint(folder / "half").digest == saved
        True
    """

    directory: Path
    manifest: AnyManifest
    environment: Mapping[str, Any]
    tensors: Mapping[str, Mapping[str, Tensor]]

    @property
    def digest(self) -> str:
        """The digest of the state: what ``save`` returned."""
        return self.manifest.digest


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
    path, manifest, environment = read_head(fs, directory)
    files = {file: read_file(fs, path, manifest, file) for file, _, _ in manifest.listing()}
    return Checkpoint(
        directory=path, manifest=manifest, environment=environment, tensors=by_table(manifest, files)
    )


def read_head(fs: Fs, directory: Path | str) -> tuple[Path, AnyManifest, Mapping[str, Any]]:
    """Where a checkpoint is, what is in it, and its environment: all but the tensors; no file more or less is there.

    Raises:
        CheckpointDamagedError: a file is missing, changed, too long or not steploop's; or there is an extra file.
        CheckpointVersionError: it is of a format that this version does not read.
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
    if others := sorted(names - {MANIFEST, ENVIRONMENT, *manifest.others()}):
        raise CheckpointDamagedError(
            f"{path} holds {others[0]!r}, which its manifest does not list. Move it elsewhere."
        )
    if isinstance(manifest, ShardManifest):
        for name, index in manifest.indexes().items():
            if read_small(fs, path, name, limit=len(index)) != index:
                raise CheckpointDamagedError(
                    f"{path / name} does not say where the manifest has the tensors: its bytes have changed. Use another "
                    "checkpoint."
                )
    return path, manifest, read_environment(fs, path)


def read_file(fs: Fs, path: Path, manifest: AnyManifest, name: str) -> dict[str, Tensor]:
    """Read and verify one file of tensors.

    Raises:
        CheckpointDamagedError: it is not the one that the manifest describes.
    """
    said = str(path / name)
    try:
        file = fs.open(path, name)
        try:
            if isinstance(manifest, ShardManifest):
                specs, digests = manifest.specs_of(name), manifest.digests_of(name)
                return read_shard(file, said, specs, digests, manifest.metadata_of(name))
            record, specs = manifest.files[name], dict(manifest.tensors[name])
            return read_tensors(file, said, record, specs, manifest.metadata[name])
        finally:
            file.close()
    except OSError as error:
        raise CheckpointDamagedError(f"{said} cannot be read: {error}. Use another checkpoint.") from error


def by_table(
    manifest: AnyManifest, files: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, dict[str, Tensor]]:
    """The tensors of all files, by the tables that they belong to."""
    found: dict[str, dict[str, Tensor]] = {table: {} for table in manifest.tensors}
    for file, values in files.items():
        found[manifest.table_of(file)] |= values
    return {table: {name: found[table][name] for name in specs} for table, specs in manifest.tensors.items()}
