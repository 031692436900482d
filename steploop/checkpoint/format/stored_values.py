"""The values of tensors as files store them, and their digests, computed by a second thread."""

import hashlib
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final, Self

import torch
from torch import Tensor

from steploop.checkpoint.format.layout import TensorSpec, file_order
from steploop.checkpoint.storage.local import FileReader
from steploop.errors import CheckpointDamagedError

__all__ = ["BLOCK", "Hasher", "bytes_of", "check_header", "read_values", "shaped", "stored_values"]

BLOCK: Final = (
    2 << 20
)  # bytes: large enough to hide a hand-over to the other thread, small enough to stay in cache


class Hasher:
    """Hash blocks in a second thread, in order, while this one reads or writes.

    Attributes:
        size: bytes that were added.
    """

    def __init__(self, size: int) -> None:
        """Args: size: bytes that will be added; few bytes are hashed without a thread."""
        self._hash = hashlib.sha256()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="steploop-hash") if size > BLOCK else None
        self._pending: deque[Future[None]] = deque()
        self.size = 0

    def add(self, block: memoryview | bytes) -> None:
        """Hash ``block``, which must not change until ``wait`` returns."""
        self.size += len(block)
        if self._pool is None:
            self._hash.update(block)
            return
        self._pending.append(self._pool.submit(self._hash.update, block))

    def wait(self) -> None:
        """Wait until every block that was added is hashed."""
        while self._pending:
            self._pending.popleft().result()

    def digest(self) -> str:
        """Return the digest of what was added since the beginning or the last ``turn``."""
        self.wait()
        return self._hash.hexdigest()

    def turn(self) -> Any:
        """Begin another digest; the object that computes this one, which is right after ``wait``."""
        before, self._hash = self._hash, hashlib.sha256()
        return before

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End the thread; its blocks may be freed afterwards."""
        if self._pool is not None:
            self._pool.shutdown()


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor."""
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def stored_values(tensor: Tensor) -> Tensor:
    """Return the values as stored: row-major, on the CPU, conjugation and negation applied."""
    values = tensor.detach().resolve_conj().resolve_neg().cpu()
    return (torch.view_as_real(values) if values.dtype == torch.complex128 else values).contiguous()


def _allocate(spec: TensorSpec) -> Tensor:
    """Allocate memory for the stored form of a tensor."""
    if spec.torch_dtype == torch.complex128:
        return torch.empty((*spec.shape, 2), dtype=torch.float64)
    return torch.empty(spec.shape, dtype=spec.torch_dtype)


def shaped(values: Tensor, spec: TensorSpec) -> Tensor:
    """Make the tensor from its stored form."""
    if spec.torch_dtype == torch.complex128:
        values = torch.view_as_complex(values)
    if spec.stride is None:
        return values
    return torch.empty_strided(spec.shape, spec.stride, dtype=spec.torch_dtype).copy_(values)


def _fill(file: FileReader, buffer: memoryview, offset: int, name: str) -> None:
    """Fill ``buffer`` from ``offset`` of a file on; CheckpointDamagedError where the file ends before."""
    if file.read_into(buffer, offset) != len(buffer):
        raise CheckpointDamagedError(
            f"{name} ends before byte {offset + len(buffer)}: it was cut short while it was read."
        )


def check_header(file: FileReader, header: bytes, name: str) -> None:
    """Raise CheckpointDamagedError where a file does not begin with ``header``."""
    start = bytearray(len(header))
    _fill(file, memoryview(start), 0, name)
    if start != header:
        raise CheckpointDamagedError(
            f"The header of {name} does not match the manifest's table of tensors. The file was changed or is another "
            "one: use another checkpoint."
        )


def read_values(
    file: FileReader, specs: Mapping[str, TensorSpec], offset: int, name: str, hasher: Hasher
) -> Iterator[tuple[str, Tensor]]:
    """Name and stored form of each tensor from ``offset`` of a file on; each was given to ``hasher`` as it was read."""
    for key in file_order(specs):
        values = _allocate(specs[key])
        data = bytes_of(values)
        for start in range(0, len(data), BLOCK):
            block = data[start : start + BLOCK]
            _fill(file, block, offset, name)
            offset += len(block)
            hasher.add(block)
        yield key, values
