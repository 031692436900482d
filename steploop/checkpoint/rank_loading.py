"""Read a checkpoint on all ranks: each file by one of them, every tensor to those that need it."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from steploop.checkpoint.exchange import received
from steploop.checkpoint.format.layout import TensorSpec
from steploop.checkpoint.format.shards import lightest_first
from steploop.checkpoint.opening import AnyManifest, Checkpoint, read_file, read_head
from steploop.checkpoint.packing import MODEL_FILE, OPTIMIZER_FILE, named_members
from steploop.checkpoint.storage.local import LOCAL, Fs
from steploop.checkpoint.votes import Votes
from steploop.core.state.several import State
from steploop.core.state.sharded import is_sharded
from steploop.errors import CheckpointDamagedError

__all__ = ["open_on_ranks"]


def open_on_ranks(directory: Path | str, *, like: State, votes: Votes, fs: Fs = LOCAL) -> Checkpoint:
    """Read a whole checkpoint and verify it, on every rank at once; what is sharded in ``like`` comes sharded.

    Nothing is passed on before every rank has verified what it has read.

    Raises:
        CheckpointDamagedError: as ``open_checkpoint``, on every rank alike; the sentence names the one that saw it.
        CheckpointVersionError: likewise.
        ConfigError: the ranks see different checkpoints.
    """
    path, manifest, environment = votes.agreed(lambda: read_head(fs, directory), CheckpointDamagedError)
    if votes.size > 1:
        votes.same(manifest.digest, f"The checkpoint {directory}")
    readers = lightest_first({file: size for file, size, _ in manifest.listing()}, votes.size)

    def read() -> dict[str, dict[str, Tensor]]:
        here = [file for file, reader in readers.items() if reader == votes.rank]
        return {file: read_file(fs, path, manifest, file) for file in here}

    held = votes.agreed(read, CheckpointDamagedError)
    device, sharded = next(iter(named_members(like).values())).device, _Sharded(like)
    tensors: dict[str, dict[str, Tensor]] = {}
    for table, name, file in _everything(manifest):
        spec = manifest.tensors[table][name]
        whole = held[file].pop(name) if file in held else None
        cut_as = sharded.like(table, name, spec)
        tensors.setdefault(table, {})[name] = received(
            whole, spec, reader=readers[file], votes=votes, like=cut_as, device=device
        )
        del whole  # before there is room for the next one
    return Checkpoint(
        directory=path,
        manifest=manifest,
        environment=environment,
        tensors={table: tensors.get(table, {}) for table in manifest.tensors},
    )


def _everything(manifest: AnyManifest) -> Iterator[tuple[str, str, str]]:
    """Table, name and file of every tensor, in one order for all ranks."""
    files = {
        (manifest.table_of(file), name): file
        for file, _, _ in manifest.listing()
        for name in manifest.specs_of(file)
    }
    for table, specs in manifest.tensors.items():
        for name in specs:
            yield table, name, files[table, name]


class _Sharded:
    """Which tensors of a checkpoint are sharded in a state, by their names there."""

    def __init__(self, like: State) -> None:
        self._model: dict[str, Tensor] = {}
        self._slots: list[tuple[str, Tensor]] = []
        for name, one in named_members(like).items():
            prefix = f"{name}." if name else ""
            for param, tensor in one.tensors.params.items():
                if is_sharded(tensor):
                    self._model[prefix + param] = tensor
                    self._model[f"{prefix}ema.{param}"] = tensor
                    self._slots.append((f"{prefix}slots.{param}.", tensor))

    def like(self, table: str, name: str, spec: TensorSpec) -> Tensor | None:
        """A tensor that is cut as this one has to be; None of one that every rank has whole."""
        found = self._model.get(name) if table in {MODEL_FILE, OPTIMIZER_FILE} else None
        if found is None and table == OPTIMIZER_FILE:
            found = next((tensor for begin, tensor in self._slots if name.startswith(begin)), None)
        return found if found is not None and tuple(found.shape) == spec.shape else None
