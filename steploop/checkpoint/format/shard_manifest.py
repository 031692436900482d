"""Write and check the second version of ``state.json``: a digest of each tensor, whatever files they stand in."""

import hashlib
import re
from collections.abc import Mapping
from typing import Any, Final

import attrs

from steploop.checkpoint.format.json_values import write_json
from steploop.checkpoint.format.layout import TensorSpec, header_bytes
from steploop.checkpoint.format.sealing import SHA256, seal
from steploop.checkpoint.format.shards import Shard, index_bytes, index_name, metadata_of
from steploop.checkpoint.format.table_entries import FORMAT, json_object, read_table
from steploop.errors import CheckpointDamagedError

__all__ = ["ShardManifest", "shard_manifest_of"]

_TABLE: Final = re.compile(r"([A-Za-z0-9_]{1,64})\.safetensors")
_MOST_TABLES: Final = 16


@attrs.frozen(kw_only=True)
class ShardManifest:
    """The content of ``state.json``, version 2.

    Attributes:
        tensors: table -> tensor name -> dtype, shape and strides.
        digests: the same -> SHA-256 of the tensor's values, as a file stores them.
        metadata: table -> what the header of its one file would hold besides the table.
        state: all that is not a tensor, as ``values.encode`` writes it.
        shards: file name -> the tensors that it holds.
    """

    tensors: Mapping[str, Mapping[str, TensorSpec]]
    digests: Mapping[str, Mapping[str, str]]
    metadata: Mapping[str, str]
    state: Any
    shards: Mapping[str, Shard] = attrs.field(factory=dict)

    @property
    def digest(self) -> str:
        """The digest of the state: of all that stands here but the names of the files."""
        return hashlib.sha256(write_json(self._content())).hexdigest()

    def _content(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": 2,
            "tensors": {
                table: {
                    name: spec.to_json() | {"sha256": self.digests[table][name]}
                    for name, spec in specs.items()
                }
                for table, specs in self.tensors.items()
            },
            "metadata": dict(self.metadata),
            "state": self.state,
        }

    def seal(self) -> bytes:
        """Return the bytes of the file."""
        return seal(self._content() | {"files": self.records(), "digest": self.digest})[0]

    def indexes(self) -> dict[str, bytes]:
        """File name -> content of the index of each table that stands in several files."""
        found = {}
        for table, specs in self.tensors.items():
            files = {file: shard.names for file, shard in self.shards.items() if shard.table == table}
            if len(files) > 1:
                found[index_name(table)] = index_bytes(files, specs)
        return found

    def table_of(self, file: str) -> str:
        """The name of the table of which a file holds a part."""
        return self.shards[file].table

    def specs_of(self, file: str) -> dict[str, TensorSpec]:
        """The table of one file."""
        shard = self.shards[file]
        return {name: self.tensors[shard.table][name] for name in shard.names}

    def digests_of(self, file: str) -> dict[str, str]:
        """Tensor name -> digest, of one file."""
        shard = self.shards[file]
        return {name: self.digests[shard.table][name] for name in shard.names}

    def metadata_of(self, file: str) -> str:
        """What the header of a file holds besides its table."""
        shard = self.shards[file]
        return metadata_of(self.metadata[shard.table], shard.names)

    def others(self) -> set[str]:
        """The names of the files that a checkpoint has besides ``state.json`` and ``environment.json``."""
        return {*self.shards, *self.indexes()}

    def records(self) -> dict[str, Any]:
        """What each file holds, as JSON."""
        return {f: {"table": shard.table, "tensors": sorted(shard.names)} for f, shard in self.shards.items()}

    def listing(self) -> list[tuple[str, int, int]]:
        """Name, bytes and number of tensors of each file of tensors."""
        return [(file, self.size_of(file), len(shard.names)) for file, shard in self.shards.items()]

    def size_of(self, file: str) -> int:
        """The bytes of a file: its table says how many they are."""
        specs = self.specs_of(file)
        return len(header_bytes(specs, self.metadata_of(file))) + sum(spec.size for spec in specs.values())


def shard_manifest_of(body: Mapping[str, Any], name: str) -> ShardManifest:
    """Check the content of an unsealed ``state.json`` of version 2; messages call it ``name``.

    Raises:
        CheckpointDamagedError: it is damaged or hostile.
    """
    if body.keys() != {"format", "version", "sha256", "digest", "files", "tensors", "metadata", "state"}:
        raise CheckpointDamagedError(
            f"{name} has the keys {str(sorted(body))[:200]}, which are not those of version 2."
        )
    tables = json_object(body["tensors"], f"{name}: tensors")
    metadata = json_object(body["metadata"], f"{name}: metadata")
    if tables.keys() != metadata.keys() or not all(isinstance(text, str) for text in metadata.values()):
        raise CheckpointDamagedError(f"{name}: the tables of tensors and their metadata do not match.")
    if len(tables) > _MOST_TABLES or not all(map(_TABLE.fullmatch, tables)):
        raise CheckpointDamagedError(
            f"{name} has the tables {str(sorted(tables))[:200]}, which are no names."
        )
    specs: dict[str, dict[str, TensorSpec]] = {}
    digests: dict[str, dict[str, str]] = {}
    for table, entries in tables.items():
        digests[table] = {
            key: _digest(key, entry, name)
            for key, entry in json_object(entries, f"{name}: tensors of {table}").items()
        }
        plain = {key: {k: v for k, v in entry.items() if k != "sha256"} for key, entry in entries.items()}
        specs[table] = read_table(plain, table, name)
    manifest = ShardManifest(
        tensors=specs,
        digests=digests,
        metadata=metadata,
        state=body["state"],
        shards=_shards(json_object(body["files"], f"{name}: files"), specs, name),
    )
    if manifest.digest != body["digest"]:
        raise CheckpointDamagedError(
            f"{name} says that the digest of its state is {str(body['digest'])[:80]}, but it is {manifest.digest}."
        )
    return manifest


def _digest(key: str, entry: Any, name: str) -> str:
    found = entry.get("sha256") if isinstance(entry, dict) else None
    if not isinstance(found, str) or not SHA256.fullmatch(found):
        raise CheckpointDamagedError(
            f"{name}: expected the SHA-256 of {key[:200]!r}, but found {str(entry)[:80]!r}."
        )
    return found


def _shards(
    files: Mapping[str, Any], tables: Mapping[str, Mapping[str, TensorSpec]], name: str
) -> dict[str, Shard]:
    """Check that the files hold each tensor of each table once."""
    held: dict[str, list[str]] = {table: [] for table in tables}
    found = {}
    for file, entry in files.items():
        if (
            not isinstance(entry, dict)
            or entry.keys() != {"table", "tensors"}
            or not isinstance(entry["table"], str)
            or entry["table"] not in tables
        ):
            raise CheckpointDamagedError(
                f"{name}: expected the table and the tensors of {file[:200]!r}, but found {str(entry)[:80]!r}."
            )
        table, names = entry["table"], entry["tensors"]
        if not _belongs(file, table) or not isinstance(names, list):
            raise CheckpointDamagedError(f"{name} lists a file {file[:200]!r}, which is no file of {table}.")
        held[table] += names
        found[file] = Shard(table, tuple(names))
    for table, names in held.items():
        if not all(isinstance(one, str) for one in names) or sorted(names) != sorted(tables[table]):
            raise CheckpointDamagedError(f"{name}: its files do not hold each tensor of {table} once.")
    if {shard.table for shard in found.values()} != set(tables):
        raise CheckpointDamagedError(f"{name}: a table stands in no file.")
    return found


def _belongs(file: str, table: str) -> bool:
    stem = table.removesuffix(".safetensors")
    return (
        file == table or re.fullmatch(rf"{re.escape(stem)}-\d{{5}}-of-\d{{5}}\.safetensors", file) is not None
    )
