"""Describe the tensors of a safetensors file: dtypes, layouts, header, limits.

A header is a function of the table of tensors, so a reader compares the bytes that are there with those that must
be there, and never parses a header that it does not trust.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import attrs
import torch
from torch import Tensor

from steploop.core.state.sharded import is_sharded
from steploop.errors import CheckpointDamagedError, CheckpointUnsupportedError

__all__ = ["TensorSpec", "file_order", "header_bytes", "spec_from_json", "spec_of"]

# What a hostile file may make a reader do is bounded by these, checked before anything is allocated.
MAX_HEADER_BYTES: Final = 16 << 20
MAX_TENSORS: Final = 100_000
MAX_DIMENSIONS: Final = 16
_MAX_SIZE: Final = 1 << 62  # of one dimension and of one tensor's bytes: int64 offsets stay exact

# torch's name: (the name in a safetensors header, bytes of one element), in the order of the library's own writer:
# wide elements first, so that every tensor is aligned.
_STORED: Final = {
    "uint64": ("U64", 8),
    "int64": ("I64", 8),
    "float64": ("F64", 8),
    "complex64": ("C64", 8),
    "float32": ("F32", 4),
    "uint32": ("U32", 4),
    "int32": ("I32", 4),
    "bfloat16": ("BF16", 2),
    "float16": ("F16", 2),
    "uint16": ("U16", 2),
    "int16": ("I16", 2),
    "float8_e5m2fnuz": ("F8_E5M2FNUZ", 1),
    "float8_e4m3fnuz": ("F8_E4M3FNUZ", 1),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e5m2": ("F8_E5M2", 1),
    "int8": ("I8", 1),
    "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
}
# The format has no such dtypes: stored as (real, imaginary) in a last axis of two, as torch.view_as_real gives it.
_AS_REAL: Final = {"complex128": "float64"}


@attrs.frozen
class TensorSpec:
    """The dtype, shape and strides of a tensor.

    Attributes:
        dtype: torch's name of it, without ``torch.``.
        shape: the size of each axis.
        stride: the step of each axis in elements, where it is not that of a contiguous (row-major) tensor:
            channels_last and other permutations come back as they were.
    """

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's object."""
        return _DTYPES[self.dtype]

    @property
    def stored(self) -> tuple[str, int, tuple[int, ...]]:
        """How the file stores it: (name of the dtype, bytes of an element, shape)."""
        if (real := _AS_REAL.get(self.dtype)) is not None:
            return *_STORED[real], (*self.shape, 2)
        return *_STORED[self.dtype], self.shape

    @property
    def size(self) -> int:
        """Its number of bytes in the file."""
        _, width, shape = self.stored
        return width * math.prod(shape)

    def to_json(self) -> dict[str, Any]:
        """Its entry in the manifest's table of tensors."""
        entry: dict[str, Any] = {"dtype": self.dtype, "shape": list(self.shape)}
        return entry if self.stride is None else entry | {"stride": list(self.stride)}

    def __str__(self) -> str:
        layout = "" if self.stride is None else f" with strides {self.stride}"
        return f"{self.dtype} {self.shape}{layout}"


_DTYPES: Final[dict[str, torch.dtype]] = {name: getattr(torch, name) for name in (*_STORED, *_AS_REAL)}
_RANK: Final = {stored: rank for rank, (stored, _) in enumerate(_STORED.values())}
_NAMES: Final = {dtype: name for name, dtype in _DTYPES.items()}


def spec_of(name: str, tensor: Tensor) -> TensorSpec:
    """Describe a tensor that will be stored as ``name``.

    A layout with gaps or overlaps (a slice, an expanded tensor) becomes the one that ``tensor.clone()`` has.

    Raises:
        CheckpointUnsupportedError: the name or the tensor cannot be stored.
    """
    if not isinstance(name, str) or name == "__metadata__" or not _encodable(name):
        raise CheckpointUnsupportedError(
            f"A tensor is named {name!r}, but safetensors needs names that are text in UTF-8 other than "
            "'__metadata__'. Rename the parameter or the buffer."
        )
    if is_sharded(tensor):  # stored whole, row-major
        return TensorSpec(_NAMES[tensor.dtype], tuple(tensor.shape))
    if (problem := _problem(tensor)) is not None:
        raise CheckpointUnsupportedError(
            f"{name!r} is {problem}, which a checkpoint cannot hold. Expected a dense tensor of one of "
            f"{', '.join(_DTYPES)} with at most {MAX_DIMENSIONS} axes; convert it first."
        )
    shape, stride = tuple(tensor.shape), tensor.stride()
    if stride != _row_major(shape):
        stride = torch.empty_like(tensor, device="meta", memory_format=torch.preserve_format).stride()
    return TensorSpec(_NAMES[tensor.dtype], shape, stride if _permuted(shape, stride) else None)


def _encodable(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _problem(tensor: Tensor) -> str | None:
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"a {type(tensor).__name__}"
    if tensor.is_nested or tensor.layout != torch.strided:
        return f"a tensor of layout {tensor.layout}"
    if tensor.device.type == "meta":
        return "on the meta device: it has no values"
    if tensor.dtype not in _NAMES:
        return f"of dtype {tensor.dtype}"
    return f"of {tensor.dim()} axes" if tensor.dim() > MAX_DIMENSIONS else None


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    stride, step = [], 1
    for size in reversed(shape):
        stride.append(step)
        step *= size
    return tuple(reversed(stride))


def _permuted(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether a tensor is row-major after a permutation of its axes, such as channels_last.

    The stride of an axis of one element counts too: it moves no value, but torch's choice of a memory format
    (channels_last or not) looks at it.
    """
    if len(stride) != len(shape) or 0 in shape or tuple(stride) == _row_major(shape):
        return False
    step = 1
    for axis_stride, size in sorted((s, n) for s, n in zip(stride, shape, strict=True) if n != 1):
        if axis_stride != step:
            return False
        step *= size
    return all(0 <= s <= step for s in stride)


def file_order(specs: Mapping[str, TensorSpec]) -> list[str]:
    """Sort the tensors as the file does: by dtype, wide elements first, then by name."""
    return sorted(specs, key=lambda name: (_RANK[specs[name].stored[0]], name))


def header_bytes(specs: Mapping[str, TensorSpec], metadata: str) -> bytes:
    """Make the head of a safetensors file: length of the JSON, the JSON, padding to 8 bytes.

    Args:
        specs: the tensors of the file by name.
        metadata: stored as the one entry ``steploop`` of ``__metadata__``: several would have no fixed order.

    Raises:
        CheckpointUnsupportedError: more tensors or longer names than a reader accepts.
    """
    if len(specs) > MAX_TENSORS:
        raise _too_much(f"{len(specs)} tensors")
    table: dict[str, Any] = {"__metadata__": {"steploop": metadata}}
    at = 0
    for name in file_order(specs):
        dtype, _, shape = specs[name].stored
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + specs[name].size]}
        at += specs[name].size
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise _too_much(f"a header of {len(text)} bytes")
    return len(text).to_bytes(8, "little") + text


def _too_much(found: str) -> CheckpointUnsupportedError:
    return CheckpointUnsupportedError(
        f"A file would have {found}, but it holds at most {MAX_TENSORS} tensors and a header of {MAX_HEADER_BYTES} bytes. "
        "Stack tensors into larger ones, or shorten their names."
    )


def spec_from_json(name: str, entry: Any) -> TensorSpec:
    """Check an untrusted entry of a table of tensors and return its spec.

    Raises:
        CheckpointDamagedError: it is no entry that ``TensorSpec.to_json`` writes.
    """
    if not isinstance(entry, dict) or not {"dtype", "shape"} <= entry.keys() <= {"dtype", "shape", "stride"}:
        raise _damaged(
            name, f"expected dtype, shape and perhaps stride, but the entry is {str(entry)[:80]!r}"
        )
    dtype, shape, stride = entry["dtype"], entry["shape"], entry.get("stride")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise _damaged(name, f"expected one of {', '.join(_DTYPES)}, but the dtype is {str(dtype)[:80]!r}")
    for label, sizes in (("shape", shape), ("stride", [] if stride is None else stride)):
        if not isinstance(sizes, list) or any(type(n) is not int or not 0 <= n < _MAX_SIZE for n in sizes):
            raise _damaged(name, f"expected a list of sizes, but the {label} is {str(sizes)[:80]!r}")
    if len(shape) > MAX_DIMENSIONS:
        raise _damaged(name, f"expected at most {MAX_DIMENSIONS} axes, but it has {len(shape)}")
    # an empty tensor may have huge other axes: torch multiplies those too
    if 16 * math.prod(n for n in shape if n) >= _MAX_SIZE:
        raise _damaged(name, f"its shape {shape} is larger than any memory")
    if stride is None:
        return TensorSpec(dtype, tuple(shape))
    if not _permuted(shape, stride):
        raise _damaged(name, f"the strides {stride} are not a permutation of the axes of {shape}")
    return TensorSpec(dtype, tuple(shape), tuple(stride))


def _damaged(name: str, problem: str) -> CheckpointDamagedError:
    return CheckpointDamagedError(f"The table of tensors is damaged: {name[:200]!r}: {problem}.")
