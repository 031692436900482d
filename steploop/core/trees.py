"""Walk, map and compare nested values: mappings, lists, tuples, attrs classes and dataclasses of tensors."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from types import MappingProxyType
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

__all__ = ["count_samples", "first_difference", "map_tensors", "named_leaves", "shapes", "to_device"]


def map_tensors(  # noqa: PLR0911  (one return for each kind of node)
    function: Callable[[Tensor], Any], tree: Any, *, other: Callable[[Any], Any] | None = None
) -> Any:
    """Build the same tree with ``function(leaf)`` in the place of every tensor.

    Every node keeps its type: a ``UserDict``, a named tuple, an attrs class or a dataclass is a new one of its kind,
    with whatever else it holds. Of a ``MappingProxyType`` it makes a dict.

    Args:
        function: what to do with a tensor.
        tree: mappings, lists, tuples, attrs classes and dataclasses, nested; anything else is a leaf.
        other: what to do with a leaf that is no tensor, and with a ``PackedSequence``; kept as it is unless given.
    """
    if tree is None:  # the usual case of an objective without outputs, and the quickest
        return None
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        mapped = {key: map_tensors(function, value, other=other) for key, value in tree.items()}
        return mapped if type(tree) is dict else _mapping_like(tree, mapped)
    if isinstance(tree, (list, tuple)):
        if other is not None and isinstance(tree, PackedSequence):
            return other(tree)
        items = [map_tensors(function, value, other=other) for value in tree]
        return (
            type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
        )  # a named tuple takes them one by one
    if attrs.has(type(tree)):
        fields = {f.name: (f.alias, getattr(tree, f.name)) for f in attrs.fields(type(tree)) if f.init}
        return attrs.evolve(
            tree, **{alias: map_tensors(function, value, other=other) for alias, value in fields.values()}
        )
    if _is_dataclass(tree):
        clone = copy.copy(tree)
        for f in dataclasses.fields(tree):  # past __init__, which may take other arguments than the fields
            value = map_tensors(function, getattr(tree, f.name), other=other)
            object.__setattr__(clone, f.name, value)  # frozen ones refuse an assignment
        return clone
    return tree if other is None else other(tree)


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _mapping_like(tree: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """The items in a mapping of the tree's type; a dict where that cannot be made, as torch's collation does."""
    if isinstance(tree, MappingProxyType):
        return items
    try:
        if isinstance(tree, MutableMapping):
            clone = copy.copy(tree)  # keeps what else it holds: a default factory, encodings
            for key, value in items.items():  # some refuse update()
                clone[key] = value
            return clone
        return type(tree)(items)  # type: ignore[call-arg]  # most immutable mappings are made of one
    except TypeError:
        return items


def named_leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf under its dotted name, in the tree's own order."""
    if isinstance(tree, Mapping):
        items: Any = tree.items()
    elif isinstance(tree, (list, tuple)):
        items = enumerate(tree)
    elif attrs.has(type(tree)):
        items = ((f.name, getattr(tree, f.name)) for f in attrs.fields(type(tree)))
    elif _is_dataclass(tree):
        items = ((f.name, getattr(tree, f.name)) for f in dataclasses.fields(tree))
    else:
        yield name, tree
        return
    for key, value in items:
        yield from named_leaves(value, f"{name}.{key}" if name else str(key))


def to_device(tree: Any, device: torch.device, *, non_blocking: bool = True) -> Any:
    """Build the same tree with its tensors on ``device``; objects with a method ``to`` (graphs, say) move by it."""
    return map_tensors(
        lambda t: t.to(device, non_blocking=non_blocking),
        tree,
        other=lambda leaf: leaf.to(device) if callable(getattr(leaf, "to", None)) else leaf,
    )


def shapes(tree: Any) -> str:
    """The shapes of a batch's tensors, for messages: ``(128, 3, 32, 32) float32, (128,) int64``."""
    found = [leaf for _, leaf in named_leaves(tree) if isinstance(leaf, Tensor)]
    return ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in found) or "no tensors"


def count_samples(batch: Any) -> int | None:
    """The size of the first tensor's first axis, or None where there is no tensor with an axis."""
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor) and batch[0].dim() > 0:
        return batch[0].shape[0]  # (inputs, targets), without a walk
    for _, leaf in named_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return leaf.shape[0]
    return None


def _tensor_difference(name: str, a: Tensor, b: Tensor) -> str | None:
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return f"{name}: {tuple(a.shape)} {a.dtype} against {tuple(b.shape)} {b.dtype}"
    x, y = a.detach().cpu(), b.detach().cpu()
    # the bits decide: equal nans are equal, and 0.0 is not -0.0
    if x.contiguous().reshape(-1).view(torch.uint8).equal(y.contiguous().reshape(-1).view(torch.uint8)):
        return None
    if x.dtype == torch.bool or x.is_complex():
        return f"{name}: {int((x != y).sum())} of {x.numel()} elements differ"
    gap = (x.double() - y.double()).abs()
    unequal = int(((x != y) & ~(x.isnan() & y.isnan())).sum())
    return (
        f"{name}: {unequal} of {x.numel()} elements differ, the largest difference is {gap.max().item():.3e}"
    )


def first_difference(a: Any, b: Any, name: str = "") -> str | None:
    """What differs first between two trees, bit for bit, or None: names the leaf and says by how much."""
    left, right = dict(named_leaves(a, name)), dict(named_leaves(b, name))
    if list(left) != list(right):
        only = [key for key in [*left, *right] if (key in left) != (key in right)]
        return f"{only[0]}: only on one side" if only else f"the order of {list(left)[:3]}... differs"
    for key, x in left.items():
        y = right[key]
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            if (difference := _tensor_difference(key, x, y)) is not None:
                return difference
        elif type(x) is not type(y):
            return f"{key}: {type(x).__name__} against {type(y).__name__}"
        elif x != y and not (x != x and y != y):  # noqa: PLR0124  (nan is the one value unequal to itself)
            return f"{key}: {x!r} against {y!r}"
    return None
