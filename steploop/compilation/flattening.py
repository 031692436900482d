"""Flatten batches and outputs to lists of tensors, and rebuild them: a graph has no structure."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
from torch import Tensor

from steploop.core.trees import map_tensors, named_leaves
from steploop.errors import CompileError

__all__ = ["Build", "Reference", "builder", "describe", "flatten", "replace_tensors"]

Build = Callable[[Sequence[Tensor]], Any]


@attrs.frozen
class Reference:
    """A placeholder for the graph's output at ``index``."""

    index: int


def flatten(batch: Any) -> tuple[list[Tensor], Any]:
    """Split a batch into its tensors and a key of all else that a graph depends on.

    The usual batch, a tuple or list of tensors, is taken by a path of its own: this is done at every step.
    """
    kind = type(batch)
    if kind is tuple or kind is list:
        key: list[Any] = [kind]
        for t in batch:
            if type(t) is not Tensor:
                return _flatten_any(batch)
            key += (t.shape, t.stride(), t.dtype, t.device)
        return list(batch), tuple(key)
    if kind is Tensor:
        return [batch], (batch.shape, batch.stride(), batch.dtype, batch.device)
    return _flatten_any(batch)


def _flatten_any(batch: Any) -> tuple[list[Tensor], Any]:
    tensors: list[Tensor] = []
    key: list[Any] = [_skeleton(batch)]
    for name, leaf in named_leaves(batch):
        if isinstance(leaf, Tensor):
            tensors.append(leaf)
            key += (name, leaf.shape, leaf.stride(), leaf.dtype, leaf.device)
        else:
            key += (name, type(leaf), leaf)
    try:
        hash(tuple(key))
    except TypeError as error:
        raise CompileError(
            f"A compiled train step takes batches of tensors, numbers and strings, but this one holds something else: {error}. "
            "Leave it out of the batch, or train without compiling."
        ) from error
    return tensors, tuple(key)


def _skeleton(tree: Any) -> Any:
    """Return the types of a tree's containers, which distinguish a list from a tuple."""
    if isinstance(tree, Mapping):
        return (type(tree), tuple((key, _skeleton(value)) for key, value in tree.items()))
    if isinstance(tree, (list, tuple)):
        return (type(tree), tuple(_skeleton(value) for value in tree))
    return type(tree)


def describe(key: Any) -> str:
    """Describe the shapes in a batch's key, for messages."""
    return ", ".join(str(tuple(part)) for part in key if type(part).__name__ == "Size") or repr(key)


def replace_tensors(tree: Any, tensors: Sequence[Tensor]) -> Any:
    """Replace a tree's tensors by these, in the order of ``flatten``."""
    following = iter(tensors)
    return map_tensors(lambda _: next(following), tree)


def builder(template: Any) -> Build:
    """Make a function that fills in ``template``: every Reference becomes its tensor."""
    if isinstance(template, Reference):
        index = template.index
        return lambda values: values[index]
    if isinstance(template, Mapping):
        parts = [(key, builder(value)) for key, value in template.items()]
        return lambda values: {key: part(values) for key, part in parts}
    if isinstance(template, (list, tuple)):
        items = [builder(value) for value in template]
        kind = type(template)
        if hasattr(kind, "_fields"):
            return lambda values: kind(*(item(values) for item in items))
        return lambda values: kind(item(values) for item in items)
    if attrs.has(type(template)):
        fields = {f.alias: builder(getattr(template, f.name)) for f in attrs.fields(type(template)) if f.init}
        return lambda values: type(template)(**{name: part(values) for name, part in fields.items()})
    return lambda _: template
