"""Write and check ``state.json``, the manifest of a checkpoint's files and their digests.

The digest stands in the file it digests: it is the SHA-256 of the file with 64 zeros in the digest's place. A file
is taken only if its bytes are exactly those that would be written for its content, so no byte in it is free.
"""

import hashlib
import re
from collections.abc import Mapping
from typing import Any, Final

import attrs

from steploop.checkpoint.format.json_values import read_json, write_json
from steploop.checkpoint.format.layout import MAX_TENSORS, TensorSpec, spec_from_json
from steploop.checkpoint.format.tensor_files import FileRecord
from steploop.checkpoint.storage.local import Fs
from steploop.errors import CheckpointDamagedError, CheckpointVersionError

__all__ = ["FORMAT_VERSION", "MANIFEST", "Manifest", "parse_manifest", "seal", "unseal"]

FORMAT: Final = "steploop checkpoint"
FORMAT_VERSION: Final = 1
MANIFEST: Final = "state.json"
MAX_MANIFEST_BYTES: Final = 32 << 20  # twice the longest header of tensors
MAX_FILES: Final = 16
FILE_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_ZEROS: Final = "0" * 64


@attrs.frozen(kw_only=True)
class Manifest:
    """The content of ``state.json``.

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
    sha256: str = _ZEROS

    def seal(self) -> tuple[bytes, str]:
        """Return the bytes of the file, and the digest it contains."""
        body = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "files": {name: attrs.asdict(record) for name, record in self.files.items()},
            "tensors": {
                file: {name: spec.to_json() for name, spec in table.items()}
                for file, table in self.tensors.items()
            },
            "metadata": dict(self.metadata),
            "state": self.state,
        }
        return seal(body)


def seal(body: Mapping[str, Any]) -> tuple[bytes, str]:
    """Write ``body`` as JSON with its own SHA-256 in it; return the bytes and the digest."""
    blank = write_json({**body, "sha256": _ZEROS})
    digest = hashlib.sha256(blank).hexdigest()
    return blank.replace(f'"sha256": "{_ZEROS}"'.encode(), f'"sha256": "{digest}"'.encode()), digest


def unseal(text: bytes, name: str, *, limit: int) -> dict[str, Any]:
    """Read a sealed file and verify its digest.

    Raises:
        CheckpointDamagedError: it is not what ``seal`` writes, byte for byte.
    """
    body = read_json(text, name, limit=limit)
    found = body.get("sha256")
    if not isinstance(found, str) or not _SHA256.fullmatch(found):
        raise CheckpointDamagedError(
            f"{name} has no SHA-256 of its own: it is damaged or was written by another program."
        )
    expected, digest = seal(body)
    if text != expected:
        raise CheckpointDamagedError(
            f"{name} says its SHA-256 is {found}, but its content has {digest}: its bytes have changed. "
            "Use another checkpoint."
        )
    return body


def parse_manifest(text: bytes, name: str = MANIFEST) -> Manifest:
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
    if type(version) is not int or version != FORMAT_VERSION:
        raise CheckpointVersionError(
            f"{name} has the format version {str(version)[:80]}, and this steploop reads version {FORMAT_VERSION}. "
            "Install the version of steploop that wrote it, or a newer one."
        )
    if body.keys() != {"format", "version", "sha256", "files", "tensors", "metadata", "state"}:
        raise CheckpointDamagedError(
            f"{name} has the keys {str(sorted(body))[:200]}, which are not those of version {version}."
        )
    files = {
        file: _record(file, entry, name) for file, entry in _object(body["files"], f"{name}: files").items()
    }
    tables = _object(body["tensors"], f"{name}: tensors")
    metadata = _object(body["metadata"], f"{name}: metadata")
    if not files.keys() == tables.keys() == metadata.keys() or len(files) > MAX_FILES:
        raise CheckpointDamagedError(f"{name}: the files listed and the tables of tensors do not match.")
    if not all(isinstance(text, str) for text in metadata.values()):
        raise CheckpointDamagedError(f"{name}: the metadata of a file is not text.")
    tensors = {}
    for file, table in tables.items():
        entries = _object(table, f"{name}: tensors of {file}")
        if len(entries) > MAX_TENSORS or "__metadata__" in entries:
            raise CheckpointDamagedError(
                f"{name} has {len(entries)} tensors in {file}; at most {MAX_TENSORS} are read."
            )
        tensors[file] = {key: spec_from_json(key, entry) for key, entry in entries.items()}
    return Manifest(
        files=files, tensors=tensors, metadata=metadata, state=body["state"], sha256=body["sha256"]
    )


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CheckpointDamagedError(f"{name}: expected an object, but found {str(value)[:80]!r}.")
    return value


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
        or not _SHA256.fullmatch(sha256)
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
