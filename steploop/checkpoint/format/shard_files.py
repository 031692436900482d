"""Write and read safetensors files in one pass, with a digest of each tensor and none of the file."""

import hashlib
from collections.abc import Iterable, Mapping

from torch import Tensor

from steploop.checkpoint.format.layout import TensorSpec, header_bytes
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

__all__ = ["read_shard", "write_shard"]


def write_shard(
    file: FileWriter, tensors: Iterable[tuple[str, Tensor]], specs: Mapping[str, TensorSpec], metadata: str
) -> dict[str, str]:
    """Write a safetensors file and flush it; the SHA-256 of each tensor's values.

    Args:
        file: a new file.
        tensors: name and values, one at a time, in the order of the file: a tensor is let go before the next one is asked
            for.
        specs: ``spec_of`` each of them.
        metadata: see ``header_bytes``.

    Raises:
        CheckpointUnsupportedError: too many tensors, before anything is written.
        OSError: the file cannot be written or flushed.
    """
    hashes = {}
    small = bytearray(header_bytes(specs, metadata))
    with Hasher(sum(spec.size for spec in specs.values())) as hasher:
        for name, tensor in tensors:
            values = stored_values(tensor)
            data = bytes_of(values)
            if len(data) <= BLOCK:
                hashes[name] = hashlib.sha256(data)
                small += data
            if small and (len(small) > BLOCK or len(data) > BLOCK):
                file.write(bytes(small))
                small.clear()
            if len(data) > BLOCK:
                for start in range(0, len(data), BLOCK):
                    hasher.add(data[start : start + BLOCK])
                    file.write(data[start : start + BLOCK])
                hashes[name] = hasher.turn()
                hasher.wait()  # the blocks are views of what is let go now
            del values, data, tensor
        file.write(bytes(small))
        file.sync()
    return {name: found.hexdigest() for name, found in hashes.items()}


def read_shard(
    file: FileReader,
    name: str,
    specs: Mapping[str, TensorSpec],
    digests: Mapping[str, str],
    metadata: str,
) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file and verify every byte of it.

    Size and header are compared before anything is allocated; the digests are those of the very bytes that are returned.

    Args:
        file: the open file.
        name: what messages call it.
        specs: its table by the manifest.
        digests: of each tensor, by the manifest.
        metadata: see ``header_bytes``.

    Raises:
        CheckpointDamagedError: the file is not the one that the manifest describes.
        OSError: it cannot be read.
    """
    header = header_bytes(specs, metadata)
    expected = len(header) + sum(spec.size for spec in specs.values())
    if file.size != expected:
        raise CheckpointDamagedError(
            f"{name} has {file.size} bytes, but the manifest's table of tensors needs {expected}. It is cut short or is "
            "another file: use another checkpoint."
        )
    check_header(file, header, name)
    values, hashes = {}, {}
    with Hasher(expected) as hasher:
        for key, read in read_values(file, specs, len(header), name, hasher):
            values[key], hashes[key] = read, hasher.turn()
        hasher.wait()
    for key, found in hashes.items():
        if found.hexdigest() != digests[key]:
            raise CheckpointDamagedError(
                f"The tensor {key!r} in {name} has the SHA-256 {found.hexdigest()}, but the manifest says {digests[key]}: its bytes "
                "have changed. Use another checkpoint."
            )
    return {key: shaped(values.pop(key), specs[key]) for key in list(specs)}
