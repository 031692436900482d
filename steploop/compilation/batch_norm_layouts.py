"""Give torch's BatchNorm calls on the CPU the memory layouts for which torch says rightly what layout they return.

They return tensors that are contiguous or channels_last, whatever they are given; their fake versions, by which Inductor
knows where an entry lies, keep the layout of what they are given. For a transposed input the two differ, and whoever
reads the result reads other entries.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["batch_norms", "keep_batch_norm_layouts"]

_FORWARD = torch.ops.aten._native_batch_norm_legit_functional.default
_BACKWARD = torch.ops.aten.native_batch_norm_backward.default


def batch_norms() -> dict[Any, Callable[..., Any]]:
    """Decompositions: the same calls, on copies of tensors that lie otherwise."""
    return {_FORWARD: _forward, _BACKWARD: _backward}


def _forward(x: Tensor, *others: Any, **named: Any) -> Any:
    dense = _dense(x, x)
    return NotImplemented if dense is x else _call(_FORWARD, (x, *others), (dense, *others), named)


def _backward(gradient: Tensor, x: Tensor, *others: Any, **named: Any) -> Any:
    dense, same = _dense(x, x), _dense(gradient, x)
    if dense is x and same is gradient:
        return NotImplemented
    return _call(_BACKWARD, (gradient, x, *others), (same, dense, *others), named)


def _dense(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor, or a copy of it, in the format that torch's kernel chooses for ``like``."""
    return tensor.contiguous(memory_format=torch._prims_common.suggest_memory_format(like))


def _call(
    call: Any, given: tuple[Any, ...], dense: tuple[Any, ...], named: dict[str, Any]
) -> tuple[Any, ...]:
    """The results of a call on dense tensors, the first of them in the layout that was expected of the call on others."""
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

    with disable_proxy_modes_tracing():
        strides = call(*given, **named)[0].stride()
    first, *rest = call(*dense, **named)
    order = sorted(range(first.dim()), key=lambda axis: -strides[axis])
    back = [order.index(axis) for axis in range(first.dim())]
    return (first.permute(order).contiguous().permute(back), *rest)


def keep_batch_norm_layouts() -> None:
    """Let Inductor give these calls their input as it lies, if contiguous or channels_last, and gradients that lie alike."""
    from torch._inductor.lowering import add_layout_constraint

    add_layout_constraint(_FORWARD, _constrained)
    add_layout_constraint(_BACKWARD, _constrained)


def _constrained(node: Any, *args: Any, **named: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, in Inductor's terms."""
    from torch._inductor import ir

    place = 1 if node.target is _BACKWARD else 0
    x, *_ = args[place:]
    shape = node.args[place].meta["val"].shape
    order = ir.get_stride_order(node.args[place].meta["val"].stride())
    x.realize()
    layout = x.maybe_get_layout()
    if isinstance(layout, ir.FixedLayout):
        strides = [int(stride) for stride in layout.stride]
        found = torch.empty_strided(shape, strides, device="meta")
        if any(found.is_contiguous(memory_format=one) for one in _formats(len(shape))):
            order = ir.get_stride_order(strides)
    new = list(args)
    for index in range(place + 1):  # the gradient, too
        new[index] = ir.ExternKernel.require_stride_order(args[index], order)
    return tuple(new), named


def _formats(dims: int) -> tuple[torch.memory_format, ...]:
    more = {4: (torch.channels_last,), 5: (torch.channels_last_3d,)}
    return (torch.contiguous_format, *more.get(dims, ()))
