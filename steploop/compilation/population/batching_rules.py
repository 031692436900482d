"""Calls for which torch has no batching rule, as calls for which it has one."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["NoRule", "call_under_vmap"]

# call -> how many of its arguments have the dtype of the input
_BATCH_NORMS = {
    torch.ops.aten._native_batch_norm_legit_functional.default: 1,
    torch.ops.aten.native_batch_norm_backward.default: 2,
}


class NoRule(Exception):  # noqa: N818  (caught where the member is known)
    """A call has no batching rule; its text is the name of the call."""


def call_under_vmap(
    target: Any, args: Sequence[Any], kwargs: dict[str, Any], decompositions: dict[Any, Callable[..., Any]]
) -> Any:
    """Call ``target`` inside of ``torch.vmap``, by other calls where it has no rule there.

    Args:
        target: an ATen or prims call.
        args: of the call.
        kwargs: of the call.
        decompositions: call -> function that computes the same by others.

    Raises:
        NoRule: there is no way.
    """
    # how a tensor of all members lies is chosen when the graph of all of them is compiled
    kwargs = {key: value for key, value in kwargs.items() if key != "memory_format"}
    if (own := _OWN.get(str(target))) is not None:
        return own(*args, **kwargs)
    if target in _BATCH_NORMS and (dtype := _other_dtype(args)) is not None:
        return _batch_norm(target, args, dtype, decompositions)
    if str(target).startswith("aten._foreach_"):
        return _one_by_one(target, args, kwargs, decompositions)
    if not isinstance(target, torch._ops.OpOverload) or _has_rule(target) or not _batched(args, kwargs):
        return target(*args, **kwargs)
    if (decomposition := decompositions.get(target)) is not None:
        result = decomposition(*args, **kwargs)
        if result is not NotImplemented:
            return result
    raise NoRule(str(target).removesuffix(".default"))


def _has_rule(target: Any) -> bool:
    keys = ("FuncTorchBatched", "FuncTorchBatchedDecomposition", "CompositeImplicitAutograd")
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), key) for key in keys)


def _batched(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    from torch.utils._pytree import tree_leaves

    return any(
        isinstance(leaf, Tensor) and torch._C._functorch.is_batchedtensor(leaf)
        for leaf in tree_leaves((args, kwargs))
    )


def _one_by_one(
    target: Any, args: Sequence[Any], kwargs: dict[str, Any], decompositions: dict[Any, Callable[..., Any]]
) -> list[Any]:
    """A call on lists of tensors: one on each."""
    single, overload = str(target).removeprefix("aten._foreach_").split(".")
    of_lists = [isinstance(a, (list, tuple)) for a in args]
    kind = {"List": "Tensor", "ScalarList": "Scalar"}.get(overload, overload)
    packet = getattr(torch.ops.aten, single, None)
    names = packet.overloads() if packet is not None else []
    if kind not in names:
        kind = next((name for name in ("default", "Tensor") if name in names), "")
    if not kind:
        raise NoRule(str(target).removesuffix(".default"))
    return [
        call_under_vmap(
            getattr(packet, kind),
            [a[i] if listed else a for a, listed in zip(args, of_lists, strict=True)],
            {k: v[i] if isinstance(v, (list, tuple)) else v for k, v in kwargs.items()},
            decompositions,
        )
        for i in range(len(args[0]))
    ]


def _convert(x: Tensor, dtype: torch.dtype) -> Tensor:
    converted: Tensor = torch.ops.aten._to_copy.default(x, dtype=dtype)
    return converted


def _copy(x: Tensor, source: Tensor, *_: bool) -> Tensor:
    value = source if source.dtype == x.dtype else _convert(source, x.dtype)
    return value.expand_as(x) if value.shape != x.shape else value.clone()


def _batch_norm(
    target: Any, args: Sequence[Any], dtype: torch.dtype, decompositions: dict[Any, Callable[..., Any]]
) -> tuple[Any, ...]:
    """BatchNorm of a low-precision input in the dtype of its weights and statistics.

    torch's rules take the two apart, into calls for which there is no kernel.
    """
    inputs = _BATCH_NORMS[target]  # the gradient is one, too
    same = [_convert(x, dtype) for x in args[:inputs]]
    first, *rest = call_under_vmap(target, [*same, *args[inputs:]], {}, decompositions)
    return (None if first is None else _convert(first, args[0].dtype), *rest)


def _other_dtype(args: Sequence[Any]) -> torch.dtype | None:
    """The dtype of weights and statistics, where it is not that of the input."""
    return next((t.dtype for t in args if isinstance(t, Tensor) and t.dtype != args[0].dtype), None)


def _fma(a: Any, b: Any, c: Any) -> Any:
    return a * b + c


_OWN: dict[str, Callable[..., Any]] = {
    "prims.convert_element_type.default": _convert,
    "prims.fma.default": _fma,
    "prims.rev.default": torch.flip,
    "aten.copy.default": _copy,
}
