"""Walk, map and compare nested values: mappings, lists, tuples, attrs classes and dataclasses of tensors."""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from types import MappingProxyType
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

__all__ = [
    "UNCOUNTED",
    "count_samples",
    "first_difference",
    "map_tensors",
    "named_leaves",
    "paths",
    "shapes",
    "to_device",
    "unkeepable",
    "with_leaves",
]


# What to do where the samples of a batch cannot be counted; the caller's name goes before.
UNCOUNTED = (
    "cannot count the samples of this batch: it has no tensor with an axis, its tensors differ in their first axis, or it is "
    "a list of things. Return (loss, outputs, weight) from the objective, with the number of samples as weight."
)


def map_tensors(  # noqa: PLR0911  (one return for each kind of node)
    function: Callable[[Tensor], Any], tree: Any, *, other: Callable[[Any], Any] | None = None
) -> Any:
    """Build the same tree with ``function(leaf)`` in the place of every tensor.

    Every node keeps its type: a ``UserDict``, a named tuple, an attrs class or a dataclass is a new one of its kind,
    with all else that it holds. Of a ``MappingProxyType`` it makes a dict.

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
        mapped = {
            key: function(value) if type(value) is Tensor else map_tensors(function, value, other=other)
            for key, value in tree.items()
        }
        return mapped if type(tree) is dict else _mapping_like(tree, mapped)
    if isinstance(tree, (list, tuple)):
        if other is not None and isinstance(tree, PackedSequence):
            return other(tree)
        # most children are tensors: a call less for each, which costs as much as the rest of the walk
        items = [
            function(value) if type(value) is Tensor else map_tensors(function, value, other=other)
            for value in tree
        ]
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


def _children(tree: Any) -> Iterable[tuple[Any, Any]] | None:
    """What a node holds, with its keys; None for a leaf."""
    if isinstance(tree, Mapping):
        return tree.items()
    if isinstance(tree, (list, tuple)):
        return enumerate(tree)
    if attrs.has(type(tree)):
        return ((f.name, getattr(tree, f.name)) for f in attrs.fields(type(tree)))
    if _is_dataclass(tree):
        return ((f.name, getattr(tree, f.name)) for f in dataclasses.fields(tree))
    return None


def named_leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf under its dotted name, in the tree's own order."""
    children = _children(tree)
    if children is None:
        yield name, tree
        return
    for key, value in children:
        yield from named_leaves(value, f"{name}.{key}" if name else str(key))


def paths(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every leaf of mappings, lists and tuples under the keys and indices that lead to it."""
    if isinstance(tree, Mapping):
        items: Any = tree.items()
    elif type(tree) in {list, tuple}:
        items = enumerate(tree)
    else:
        yield path, tree
        return
    for key, value in items:
        yield from paths(value, (*path, key))


def with_leaves(tree: Any, leaves: Mapping[tuple[Any, ...], Any], path: tuple[Any, ...] = ()) -> Any:
    """The same tree with other leaves where ``leaves`` has some for their paths."""
    if isinstance(tree, Mapping):
        return {key: with_leaves(value, leaves, (*path, key)) for key, value in tree.items()}
    if type(tree) in {list, tuple}:
        return type(tree)(with_leaves(value, leaves, (*path, i)) for i, value in enumerate(tree))
    return leaves.get(path, tree)


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
    """The number of samples of a batch: the length of the first axis of all its tensors.

    None where that would be a guess: there is no tensor with an axis, the first axes differ (time-first tensors,
    graphs, packed sequences), or tensors stand in a list of things (images of their own sizes).
    """
    if type(batch) is tuple and len(batch) == 2:  # (inputs, targets), without a walk
        first, second = batch
        if type(first) is Tensor and type(second) is Tensor and first.dim() and second.dim():
            return first.shape[0] if first.shape[0] == second.shape[0] else None
    if type(batch) is list and _is_list_of_things(batch):
        return None
    sizes: set[int | None] = set()
    _collect_sizes(batch, sizes, outermost=True)
    return sizes.pop() if len(sizes) == 1 else None


def _is_list_of_things(batch: list[Any]) -> bool:
    """Whether a batch that is a list holds samples and not fields: a DataLoader gives fields as a list, too."""
    fields = all(isinstance(item, Tensor) for item in batch)
    alike = fields and len(batch) > 2 and len({item.shape for item in batch}) == 1
    return alike or (not fields and not any(isinstance(item, Tensor) for item in batch) and len(batch) > 0)


def _collect_sizes(tree: Any, sizes: set[int | None], *, outermost: bool = False) -> None:
    if isinstance(tree, Tensor):
        if tree.dim():
            sizes.add(tree.size(0))
    elif isinstance(tree, list) and not outermost:
        if any(isinstance(leaf, Tensor) for _, leaf in named_leaves(tree)):
            sizes.add(None)
    else:
        for _, value in _children(tree) or ():
            _collect_sizes(value, sizes)


def unkeepable(tree: Any, name: str = "") -> tuple[str, Any] | None:
    """The dotted name and value of the first leaf that neither a state nor a checkpoint can hold; None if there is none.

    They hold None, bool, int, float, str, tensors, and lists, tuples and mappings of them.
    """
    if tree is None or isinstance(tree, (bool, str, float, Tensor)) or type(tree) is int:
        return None
    if type(tree) in {list, tuple}:
        items: Any = enumerate(tree)
    elif isinstance(tree, Mapping):
        bad = [key for key in tree if key is not None and not isinstance(key, (bool, int, float, str))]
        if bad:
            return f"{name}[{type(bad[0]).__name__}]", bad[0]
        items = tree.items()
    else:
        return name, tree
    return next((found for key, value in items if (found := unkeepable(value, f"{name}.{key}"))), None)


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
