"""Write and read safetensors files in one pass, hashing on the way.

safetensors itself has no checksum and no fsync, maps files into memory (a file cut short later kills the process)
and hashes nothing. The format is 8 bytes, a JSON header and the raw values, so it is written and read here: a
second thread hashes a block while the first writes it (both release the interpreter lock), no second pass reads it
again, and no second copy of the tensors is made.
"""

import hashlib
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final, Self

import attrs
import torch
from torch import Tensor

from steploop.checkpoint.format.layout import TensorSpec, file_order, header_bytes
from steploop.checkpoint.storage.local import FileReader, FileWriter
from steploop.errors import CheckpointDamagedError

__all__ = ["FileRecord", "hash_tensors", "read_tensors", "write_tensors"]

BLOCK: Final = (
    2 << 20
)  # bytes: large enough to hide a hand-over to the other thread, small enough to stay in cache


@attrs.frozen
class FileRecord:
    """A file's size and digest, as the manifest lists them.

    Attributes:
        size: in bytes.
        sha256: of all its bytes, in hexadecimal.
    """

    size: int
    sha256: str


class _Hasher:
    """Hash blocks in a second thread, in order, while this one reads or writes."""

    def __init__(self, size: int) -> None:
        """Args: size: bytes that will be added; few bytes are hashed without a thread."""
        self._hash = hashlib.sha256()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="steploop-hash") if size > BLOCK else None
        self._pending: deque[Future[None]] = deque()
        self._size = 0

    def add(self, block: memoryview | bytes) -> None:
        """Hash ``block``, which must not change until ``wait`` returns."""
        self._size += len(block)
        if self._pool is None:
            self._hash.update(block)
            return
        self._pending.append(self._pool.submit(self._hash.update, block))

    def wait(self) -> None:
        """Wait until every block that was added is hashed."""
        while self._pending:
            self._pending.popleft().result()

    def record(self) -> FileRecord:
        """Return the size and digest of what was added so far."""
        self.wait()
        return FileRecord(self._size, self._hash.hexdigest())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End the thread; its blocks may be freed afterwards."""
        if self._pool is not None:
            self._pool.shutdown()


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor."""
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _host(tensor: Tensor) -> Tensor:
    """Return the values as stored: row-major, on the CPU, conjugation and negation applied."""
    values = tensor.detach().resolve_conj().resolve_neg().cpu()
    return (torch.view_as_real(values) if values.dtype == torch.complex128 else values).contiguous()


def _blocks(
    tensors: Mapping[str, Tensor], specs: Mapping[str, TensorSpec], hasher: _Hasher
) -> Iterator[memoryview | bytes]:
    """Yield the values of a file in blocks, with at most one copied tensor at a time."""
    small = bytearray()
    for name in file_order(specs):
        values = _host(tensors[name])
        data = _bytes_of(values)
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
    with _Hasher(sum(spec.size for spec in specs.values())) as hasher:
        hasher.add(header)
        file.write(header)
        for block in _blocks(tensors, specs, hasher):
            hasher.add(block)
            file.write(block)
            del block  # it may be all that holds a copy, and the next one is about to be made
        file.sync()
        return hasher.record()


class _Nowhere:
    """A file that discards everything; hashing a state means writing it here."""

    def write(self, data: memoryview | bytes) -> None:
        pass

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass


def hash_tensors(tensors: Mapping[str, Tensor], specs: Mapping[str, TensorSpec], metadata: str) -> FileRecord:
    """Return the record of the file that ``write_tensors`` would write."""
    return write_tensors(_Nowhere(), tensors, specs, metadata)


def _allocate(spec: TensorSpec) -> Tensor:
    """Allocate memory for the stored form of a tensor."""
    if spec.torch_dtype == torch.complex128:
        return torch.empty((*spec.shape, 2), dtype=torch.float64)
    return torch.empty(spec.shape, dtype=spec.torch_dtype)


def _shaped(values: Tensor, spec: TensorSpec) -> Tensor:
    """Make the tensor from its stored form."""
    if spec.torch_dtype == torch.complex128:
        values = torch.view_as_complex(values)
    if spec.stride is None:
        return values
    return torch.empty_strided(spec.shape, spec.stride, dtype=spec.torch_dtype).copy_(values)


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
    with _Hasher(expected) as hasher:
        start = bytearray(len(header))
        _fill(file, memoryview(start), 0, name)
        if start != header:
            raise CheckpointDamagedError(
                f"The header of {name} does not match the manifest's table of tensors. The file was changed or "
                "is another one: use another checkpoint."
            )
        hasher.add(header)
        values, at = {}, len(header)
        for key in file_order(specs):
            values[key] = _allocate(specs[key])
            data = _bytes_of(values[key])
            for offset in range(0, len(data), BLOCK):
                block = data[offset : offset + BLOCK]
                _fill(file, block, at, name)
                at += len(block)
                hasher.add(block)
        found = hasher.record()
    if found != record:
        raise CheckpointDamagedError(
            f"{name} has the SHA-256 {found.sha256}, but the manifest says {record.sha256}: its bytes have changed. "
            "Use another checkpoint."
        )
    return {key: _shaped(values.pop(key), specs[key]) for key in list(specs)}


def _fill(file: FileReader, buffer: memoryview, offset: int, name: str) -> None:
    if file.read_into(buffer, offset) != len(buffer):
        raise CheckpointDamagedError(
            f"{name} ends before byte {offset + len(buffer)}: it was cut short while it was read."
        )
