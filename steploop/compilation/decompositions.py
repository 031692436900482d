"""Which calls a graph is made of: torch's decompositions and ours, and the settings under which they are chosen."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from steploop.compilation.batch_norm_layouts import batch_norms
from steploop.compilation.low_precision import in_float32

__all__ = [
    "adds_by_index",
    "decompositions",
    "decompositions_on_cpu",
    "inductor_options",
    "kept_calls",
    "on_cpu",
    "table_for",
]

# ATen calls that stay ATen calls on the CPU. Inductor's own code for them was slower, on channels_last tensors most
# of all: the backward of max-pooling is a scatter, and BatchNorm reduces over every axis but the innermost.
_KEPT = (
    "_native_batch_norm_legit_functional.default",
    "native_batch_norm_backward.default",
    "max_pool2d_with_indices.default",
    "max_pool2d_with_indices_backward.default",
)


# ATen calls that write into entries which tensors choose, perhaps several times into one
_ADDS_BY_INDEX = {
    "index_put", "index_put_", "_unsafe_index_put", "_index_put_impl_", "_unsafe_masked_index_put_accumulate", "index_add",
    "index_reduce", "scatter.reduce", "scatter.value_reduce", "scatter_add", "scatter_reduce", "put", "embedding_dense_backward",
}  # fmt: skip


def adds_by_index(module: fx.GraphModule) -> bool:
    """Whether a graph may add into one entry from several threads."""
    targets = [node.target for node in module.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    return any({t._opname, f"{t._opname}.{t._overloadname}"} & _ADDS_BY_INDEX for t in targets)


def _norms(tensors: list[Tensor], ord: float = 2, dtype: torch.dtype | None = None) -> list[Tensor]:  # noqa: A002 (torch's name)
    """Decompose ``_foreach_norm`` into single norms, which fuse with what precedes them."""
    return [torch.linalg.vector_norm(t, ord, dtype=dtype) for t in tensors]


def _products(tensors: list[Tensor], factor: Tensor) -> list[Tensor]:
    """Decompose ``_foreach_mul`` into single products: on a CPU there is no kernel for a list."""
    return [t * factor for t in tensors]


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Return Inductor's decompositions and ours."""
    from torch._inductor.decomposition import select_decomp_table

    return {**select_decomp_table(), torch.ops.aten._foreach_norm.Scalar: _norms}


def decompositions_on_cpu() -> dict[Any, Callable[..., Any]]:
    """Return the decompositions for the CPU; a named function, because Inductor's cache key has its name."""
    table = {**decompositions(), **in_float32(), torch.ops.aten._foreach_mul.Tensor: _products}
    for op in kept_calls():
        table.pop(op, None)
    return table


def _view_or_copy(x: Tensor, size: Sequence[int]) -> Any:
    """Copy where there is no view: a decomposed call may lie otherwise than the call, as GroupNorm of channels_last images."""
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

    if x.is_contiguous():
        return NotImplemented
    with disable_proxy_modes_tracing():
        try:
            torch.ops.aten.view.default(x, size)
        except (RuntimeError, ValueError):
            pass
        else:
            return NotImplemented
    return x.reshape(size)


def table_for(inputs: Sequence[Tensor]) -> dict[Any, Callable[..., Any]]:
    """Return the decompositions that a trace of these inputs applies."""
    table = decompositions_on_cpu() | batch_norms() if on_cpu(inputs) else decompositions()
    return {**table, torch.ops.aten.view.default: _view_or_copy}


def kept_calls() -> list[Any]:
    """The calls that stay calls on the CPU."""
    found = []
    for name in _KEPT:
        op, overload = name.split(".")
        found.append(getattr(getattr(torch.ops.aten, op), overload))
    return found


def on_cpu(inputs: Sequence[Tensor]) -> bool:
    """Whether all tensors are the CPU's."""
    return all(t.device.type == "cpu" for t in inputs)


def inductor_options(*, cpp_wrapper: bool) -> dict[str, Any]:
    """Return Inductor's settings for our graphs."""
    return {
        # torch's own generators, so that a seed gives the numbers that eager draws
        "fallback_random": True,
        # the caller has compared shapes and strides already
        "size_asserts": False,
        "scalar_asserts": False,
        "nan_asserts": False,
        # what calls the kernels, in C++ too: 39 us a step instead of 62 on a small model
        "cpp_wrapper": cpp_wrapper,
    }
