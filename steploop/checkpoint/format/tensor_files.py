"""Write and read safetensors files in one pass, hashing on the way.

safetensors itself has no checksum and no fsync, maps files into memory (a file cut short later kills the process)
and hashes nothing. The format is 8 bytes, a JSON header and the raw values, so it is written and read here: a
second thread hashes a block while the first writes it (both release the interpreter lock), no second pass reads it
again, and no second copy of the tensors is made.
"""

from collections.abc import Iterator, Mapping

import attrs
from torch import Tensor

from steploop.checkpoint.format.layout import TensorSpec, file_order, header_bytes
from steploop.checkpoint.format.stored_values import (
    BLOCK,
    Hasher,
    bytes_of,
    check_header,
    read_values,
    shaped,
    stored_values,
)
from steploop.checkpoint.storage.local import FileReader, FileWriter
from steploop.errors import CheckpointDamagedError

__all__ = ["FileRecord", "Nowhere", "hash_tensors", "read_tensors", "write_tensors"]


@attrs.frozen
class FileRecord:
    """A file's size and digest, as the manifest lists them.

    Attributes:
        size: in bytes.
        sha256: of all its bytes, in hexadecimal.
    """

    size: int
    sha256: str


def _blocks(
    tensors: Mapping[str, Tensor], specs: Mapping[str, TensorSpec], hasher: Hasher
) -> Iterator[memoryview | bytes]:
    """Yield the values of a file in blocks, with at most one copied tensor at a time."""
    small = bytearray()
    for name in file_order(specs):
        values = stored_values(tensors[name])
        data = bytes_of(values)
        if len(small) + len(data) <= BLOCK:
            small += data
        else:
            if small:
                yield bytes(small)
                small.clear()
            for start in range(0, len(data), BLOCK):
                yield data[start : start + BLOCK]
            if values.data_ptr() != tensors[name].data_ptr():
                hasher.wait()
        del values, data  # before the next copy is made
    if small:
        yield bytes(small)


def write_tensors(
    file: FileWriter, tensors: Mapping[str, Tensor], specs: Mapping[str, TensorSpec], metadata: str
) -> FileRecord:
    """Write a safetensors file, hash it on the way, and flush it.

    Args:
        file: a new file.
        tensors: the values by name, on any device and in any layout.
        specs: ``spec_of`` each of them.
        metadata: see ``header_bytes``.

    Raises:
        CheckpointUnsupportedError: too many tensors, before anything is written.
        OSError: the file cannot be written or flushed.
    """
    header = header_bytes(specs, metadata)
    with Hasher(sum(spec.size for spec in specs.values())) as hasher:
        hasher.add(header)
        file.write(header)
        for block in _blocks(tensors, specs, hasher):
            hasher.add(block)
            file.write(block)
            del block  # it may be all that holds a copy, and the next one is about to be made
        file.sync()
        return FileRecord(hasher.size, hasher.digest())


class Nowhere:
    """A file that discards everything; hashing a state means writing it here."""

    def write(self, data: memoryview | bytes) -> None:
        """Discard the bytes."""

    def sync(self) -> None:
        """Flush nothing."""

    def close(self) -> None:
        """Close nothing."""


def hash_tensors(tensors: Mapping[str, Tensor], specs: Mapping[str, TensorSpec], metadata: str) -> FileRecord:
    """Return the record of the file that ``write_tensors`` would write."""
    return write_tensors(Nowhere(), tensors, specs, metadata)


def read_tensors(
    file: FileReader, name: str, record: FileRecord, specs: Mapping[str, TensorSpec], metadata: str
) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file and verify every byte of it.

    The file's size and header are compared before anything is allocated; the digest is that of the very bytes that
    are returned, so a file that changes while or after it is read does no harm.

    Args:
        file: the open file.
        name: what messages call it.
        record: its size and digest by the manifest.
        specs: its table by the manifest.
        metadata: see ``header_bytes``.

    Raises:
        CheckpointDamagedError: the file is not the one that the manifest describes.
        OSError: it cannot be read.
    """
    header = header_bytes(specs, metadata)
    expected = len(header) + sum(spec.size for spec in specs.values())
    if not file.size == record.size == expected:
        raise CheckpointDamagedError(
            f"{name} has {file.size} bytes, but the manifest says {record.size} and its table of tensors needs "
            f"{expected}. It is cut short or is another file: use another checkpoint."
        )
    check_header(file, header, name)
    with Hasher(expected) as hasher:
        hasher.add(header)
        values = dict(read_values(file, specs, len(header), name, hasher))
        found = FileRecord(hasher.size, hasher.digest())
    if found != record:
        raise CheckpointDamagedError(
            f"{name} has the SHA-256 {found.sha256}, but the manifest says {record.sha256}: its bytes have changed. "
            "Use another checkpoint."
        )
    return {key: shaped(values.pop(key), specs[key]) for key in list(specs)}
