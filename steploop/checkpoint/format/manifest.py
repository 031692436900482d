"""Write and check ``state.json``, the manifest of a checkpoint's files and their digests."""

import re
from collections.abc import Mapping
from typing import Any, Final

import attrs

from steploop.checkpoint.format.layout import TensorSpec
from steploop.checkpoint.format.sealing import SHA256, ZEROS, seal, unseal
from steploop.checkpoint.format.shard_manifest import ShardManifest, shard_manifest_of
from steploop.checkpoint.format.table_entries import FORMAT, json_object, read_table, write_table
from steploop.checkpoint.format.tensor_files import FileRecord
from steploop.checkpoint.storage.local import Fs
from steploop.errors import CheckpointDamagedError, CheckpointVersionError

__all__ = ["MANIFEST", "Manifest", "parse_manifest", "read_small"]

MANIFEST: Final = "state.json"
MAX_MANIFEST_BYTES: Final = 64 << 20  # four times the longest header of tensors
_SHARDED: Final = 2
MAX_FILES: Final = 16
FILE_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@attrs.frozen(kw_only=True)
class Manifest:
    """The content of ``state.json``, version 1.

    Attributes:
        files: size and digest of each safetensors file.
        tensors: file name -> tensor name -> dtype, shape and strides.
        state: all that is not a tensor, as ``values.encode`` writes it.
        metadata: what each file's header holds besides the table.
        sha256: the digest of ``state.json``, and so of the whole checkpoint.
    """

    files: Mapping[str, FileRecord]
    tensors: Mapping[str, Mapping[str, TensorSpec]]
    state: Any
    metadata: Mapping[str, str]
    sha256: str = ZEROS

    def seal(self) -> tuple[bytes, str]:
        """Return the bytes of the file, and the digest it contains."""
        body = {
            "format": FORMAT,
            "version": 1,
            "files": self.records(),
            "tensors": {file: write_table(table) for file, table in self.tensors.items()},
            "metadata": dict(self.metadata),
            "state": self.state,
        }
        return seal(body)

    @property
    def digest(self) -> str:
        """The digest of the state."""
        return self.sha256

    def others(self) -> set[str]:
        """The names of the files that a checkpoint has besides ``state.json`` and ``environment.json``."""
        return set(self.files)

    def table_of(self, file: str) -> str:
        """The table that stands in a file: the one of its name."""
        return file

    def specs_of(self, file: str) -> Mapping[str, TensorSpec]:
        """The table of one file."""
        return self.tensors[file]

    def records(self) -> dict[str, Any]:
        """What is known of each file of tensors, as JSON."""
        return {name: attrs.asdict(record) for name, record in self.files.items()}

    def listing(self) -> list[tuple[str, int, int]]:
        """Name, bytes and number of tensors of each file of tensors."""
        return [(name, record.size, len(self.tensors[name])) for name, record in self.files.items()]


def parse_manifest(text: bytes, name: str = MANIFEST) -> Manifest | ShardManifest:
    """Check and return the content of ``state.json``; messages call it ``name``.

    Raises:
        CheckpointVersionError: it is of a format version that is not read here.
        CheckpointDamagedError: it is damaged or hostile.
    """
    body = unseal(text, name, limit=MAX_MANIFEST_BYTES)
    if body.get("format") != FORMAT:
        raise CheckpointDamagedError(
            f"{name} is of the format {str(body.get('format'))[:80]!r}; expected {FORMAT!r}."
        )
    version = body.get("version")
    if type(version) is not int or version not in {1, _SHARDED}:
        raise CheckpointVersionError(
            f"{name} has the format version {str(version)[:80]}, and this steploop reads the versions 1 and 2. "
            "Install the version of steploop that wrote it, or a newer one."
        )
    return _manifest_of(body, name) if version == 1 else shard_manifest_of(body, name)


def _manifest_of(body: Mapping[str, Any], name: str) -> Manifest:
    if body.keys() != {"format", "version", "sha256", "files", "tensors", "metadata", "state"}:
        raise CheckpointDamagedError(
            f"{name} has the keys {str(sorted(body))[:200]}, which are not those of version 1."
        )
    files = {
        file: _record(file, entry, name)
        for file, entry in json_object(body["files"], f"{name}: files").items()
    }
    tables = json_object(body["tensors"], f"{name}: tensors")
    metadata = json_object(body["metadata"], f"{name}: metadata")
    if not files.keys() == tables.keys() == metadata.keys() or len(files) > MAX_FILES:
        raise CheckpointDamagedError(f"{name}: the files listed and the tables of tensors do not match.")
    if not all(isinstance(text, str) for text in metadata.values()):
        raise CheckpointDamagedError(f"{name}: the metadata of a file is not text.")
    return Manifest(
        files=files,
        tensors={file: read_table(table, file, name) for file, table in tables.items()},
        metadata=metadata,
        state=body["state"],
        sha256=body["sha256"],
    )


def _record(file: str, entry: Any, name: str) -> FileRecord:
    if not FILE_NAME.fullmatch(file) or file == MANIFEST:
        raise CheckpointDamagedError(
            f"{name} lists a file {file[:200]!r}, but a name has up to 128 letters, digits, dots, dashes and "
            "underscores, and begins with a letter or digit."
        )
    size, sha256 = (
        (entry.get("size"), entry.get("sha256"))
        if isinstance(entry, dict) and len(entry) == 2
        else (None, None)
    )
    if (
        type(size) is not int
        or not 0 <= size < 1 << 62
        or not isinstance(sha256, str)
        or not SHA256.fullmatch(sha256)
    ):
        raise CheckpointDamagedError(
            f"{name}: expected the size and SHA-256 of {file}, but found {str(entry)[:80]!r}."
        )
    return FileRecord(size, sha256)


def read_small(fs: Fs, directory: Any, name: str, *, limit: int) -> bytes:
    """Read a whole small file.

    Raises:
        CheckpointDamagedError: it is not there, is no regular file, or has more than ``limit`` bytes.
    """
    try:
        file = fs.open(directory, name)
    except OSError as error:
        raise CheckpointDamagedError(
            f"{directory / name} cannot be read: {error}. This is not a checkpoint, or it is damaged."
        ) from error
    try:
        if file.size > limit:
            raise CheckpointDamagedError(
                f"{directory / name} has {file.size} bytes, and at most {limit} are read."
            )
        text = bytearray(file.size)
        text = text[: file.read_into(memoryview(text), 0)]
    finally:
        file.close()
    return bytes(text)
