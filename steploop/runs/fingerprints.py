"""Compute a cheap fingerprint of tensors from a few of their values."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from steploop.core.state.sharded import is_sharded

__all__ = ["fingerprint"]

_VALUES = 1024  # looked at of each tensor, evenly over it, the first and the last among them


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A digest of names, shapes, dtypes and some values; equal for equal tensors, wherever they are."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        digest.update(_some_bytes(tensor.detach()))
    return digest.hexdigest()


def _some_bytes(tensor: Tensor) -> bytes:
    count = tensor.numel()
    if count == 0 or tensor.is_meta or tensor.layout != torch.strided or is_sharded(tensor):
        return b""
    places = torch.linspace(0, count - 1, min(count, _VALUES), dtype=torch.float64).long()
    try:
        # take, for a flat view of a tensor that does not lie row-major would copy all of it
        some = tensor.resolve_conj().resolve_neg().take(places.to(tensor.device)).cpu()
        return bytes(some.contiguous().view(torch.uint8).numpy().tobytes())
    except (RuntimeError, NotImplementedError):  # a dtype that take does not know
        return b""
