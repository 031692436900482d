"""Compute bfloat16 and float16 products in float32 on processors without such arithmetic."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["in_float32"]

_NARROW = {torch.bfloat16, torch.float16}


def _lacking(tensor: Tensor) -> bool:
    if tensor.device.type != "cpu" or tensor.dtype not in _NARROW:
        return False
    if tensor.dtype == torch.float16:
        return not torch.cpu._is_amx_fp16_supported()
    return not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def in_float32() -> dict[Any, Callable[..., Any]]:
    """Make decompositions that multiply in float32 and round once, at the end.

    oneDNN's kernels for bfloat16 accumulate in float32 and round at the end too, so the numbers are the same up to
    the order of the sum. Where the processor has no instruction for it they emulate each product, which took ten
    times as long as float32 on AVX2.
    """
    aten = torch.ops.aten
    ops = (
        aten.convolution.default,
        aten.convolution_backward.default,
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
    )
    return {op: _widened(op) for op in ops}


def _widened(op: Any) -> Callable[..., Any]:
    def decomposition(*args: Any, **kwargs: Any) -> Any:
        first = args[0]
        if not isinstance(first, Tensor) or not _lacking(first):
            return NotImplemented
        dtype = first.dtype
        wide = [arg.float() if isinstance(arg, Tensor) and arg.dtype == dtype else arg for arg in args]
        result = op(*wide, **kwargs)
        if isinstance(result, Tensor):
            return result.to(dtype)
        return tuple(part.to(dtype) if isinstance(part, Tensor) else part for part in result)

    return decomposition
