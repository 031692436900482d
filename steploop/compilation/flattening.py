"""Flatten batches and outputs to lists of tensors, and rebuild them: a graph has no structure."""

import dataclasses
import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from steploop.core.trees import map_tensors
from steploop.errors import CompileError

__all__ = [
    "Build",
    "Flat",
    "Reference",
    "UsualForm",
    "builder",
    "describe",
    "flatten",
    "rebuild",
    "renumbered",
]

Build = Callable[[Sequence[Tensor]], Any]

# Its tensors, a key of all else that a graph depends on, and its numbers, which a graph takes as they come.
Flat = tuple[list[Tensor], Any, list[Any]]

_NO_NUMBERS: list[Any] = []
_STRIDED = torch.strided
_PLAIN = (bool, str, bytes, int, float, complex, enum.Enum, torch.dtype, torch.device, type(None))


class Reference:
    """A placeholder for the graph's output at ``index``."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index


def flatten(batch: Any) -> Flat:
    """Split a batch into its tensors, a key of its structure, and its numbers."""
    kind = type(batch)
    if kind is tuple or kind is list:
        key: list[Any] = [kind]
        for t in batch:
            # a complex tensor may be a conjugate, whose memory holds other numbers
            if (
                type(t) is not Tensor
                or t.requires_grad
                or t.layout is not _STRIDED
                or t.is_neg()
                or t.is_complex()
            ):
                return _flatten_any(batch)
            key += (t.shape, t.stride(), t.dtype, t.device)
        return list(batch), tuple(key), _NO_NUMBERS
    return _flatten_any(batch)


class UsualForm:
    """The form of a usual batch, a tuple or list of tensors: the next one is compared with it, and needs no key.

    Args:
        flat: of the batch.
        kind: of the batch.
    """

    def __init__(self, flat: Flat, kind: type[Any]) -> None:
        self._kind = kind
        self._key = flat[1]
        self._parts = [(t.shape, t.stride(), t.dtype, t.device) for t in flat[0]]

    @classmethod
    def of(cls, batch: Any, flat: Flat) -> "UsualForm | None":
        """The form of a batch; None where it is not a usual one."""
        kind = type(batch)
        usual = (kind is tuple or kind is list) and all(
            type(t) is Tensor and not t.is_complex() for t in batch
        )
        return cls(flat, kind) if usual else None

    def flat(self, batch: Any) -> Flat | None:
        """What ``flatten`` gives for a batch of this form; None for another one."""
        parts = self._parts
        if type(batch) is not self._kind or len(batch) != len(parts):
            return None
        for t, (shape, stride, dtype, device) in zip(batch, parts):  # noqa: B905  (strict costs as much as a tensor)
            if (
                type(t) is not Tensor
                or t.dtype is not dtype
                or t.shape != shape
                or t.layout is not _STRIDED
                or t.stride() != stride
                or t.device != device
                or t.requires_grad
                or t.is_neg()
            ):
                return None
        return list(batch), self._key, _NO_NUMBERS


def _flatten_any(batch: Any) -> Flat:
    flat: Flat = ([], [], [])
    _walk(batch, "", *flat)
    return flat[0], tuple(flat[1]), flat[2]


def _walk(tree: Any, name: str, tensors: list[Tensor], key: list[Any], numbers: list[Any]) -> None:  # noqa: C901  (one branch for each kind)
    """Append what a tree holds, in the order of ``map_tensors``."""
    kind = type(tree)
    if isinstance(tree, Tensor):
        _check_tensor(tree, name)
        plain = tree.resolve_conj().resolve_neg() if tree.is_complex() or tree.is_neg() else tree
        tensors.append(plain)
        key += (plain.shape, plain.stride(), plain.dtype, plain.device)
    elif kind is int or kind is float:
        key.append(kind)
        numbers.append(tree)
    elif isinstance(tree, Mapping):
        key += (kind, len(tree))
        for part, value in tree.items():
            _check_plain(part, f"{name}[{type(part).__name__}]")
            key.append(_exact(part))
            _walk(value, f"{name}.{part}", tensors, key, numbers)
    elif isinstance(tree, (list, tuple)):
        key += (kind, len(tree))
        for index, value in enumerate(tree):
            _walk(value, f"{name}.{index}", tensors, key, numbers)
    elif attrs.has(kind):
        key.append(kind)
        for f in attrs.fields(kind):
            if f.init:
                _walk(getattr(tree, f.name), f"{name}.{f.name}", tensors, key, numbers)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        key.append(kind)
        for part in dataclasses.fields(tree):
            _walk(getattr(tree, part.name), f"{name}.{part.name}", tensors, key, numbers)
    else:
        _check_plain(tree, name)
        key += (kind, _exact(tree))


def _exact(value: Any) -> Any:
    """A value whose equality is that of its bits: 0.0 is not -0.0, True is not 1, and nan is nan."""
    if isinstance(value, (bool, float, complex)):
        return (type(value), repr(value))
    return value


def _check_plain(value: Any, name: str) -> None:
    if not isinstance(value, _PLAIN):
        kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
        raise CompileError(
            f"takes batches of tensors, numbers, texts, bools, enums and None, in lists, tuples, mappings, attrs classes and "
            f"dataclasses, but {('batch' + name)!r} is a {kind}. Make it a tensor (torch.as_tensor), or leave it out of the batch."
        )


def _check_tensor(tensor: Tensor, name: str) -> None:
    what = None
    if tensor.layout is not torch.strided:
        what = f"is {str(tensor.layout).removeprefix('torch.')}, and a graph takes dense tensors only. Pass x.to_dense()."
    elif type(tensor) not in {Tensor, nn.Parameter} and not isinstance(tensor, torch._subclasses.FakeTensor):
        what = f"is a {type(tensor).__name__}, a class of its own. Pass x.as_subclass(torch.Tensor)."
    elif tensor.requires_grad:
        what = "requires a gradient, which would be lost. Pass x.detach(), and call requires_grad_() in the objective."
    if what is not None:
        raise CompileError(f"takes a batch whose tensor {('batch' + name)!r} {what}")


def describe(key: Any) -> str:
    """Describe the shapes in a batch's key, for messages."""
    return ", ".join(str(tuple(part)) for part in key if type(part).__name__ == "Size") or repr(key)


def rebuild(tree: Any, tensors: Sequence[Any], numbers: Sequence[Any]) -> Any:
    """Replace a tree's tensors and numbers by these, in the order of ``flatten``."""
    following, counting = iter(tensors), iter(numbers)

    def other(leaf: Any) -> Any:
        if isinstance(leaf, PackedSequence):
            return map_tensors(lambda _: next(following), leaf)
        return next(counting) if type(leaf) in {int, float} else leaf

    return map_tensors(lambda _: next(following), tree, other=other)


def builder(template: Any) -> Build:
    """Make a function that fills in ``template``: every Reference becomes its tensor."""
    if isinstance(template, Reference):
        index = template.index
        return lambda values: values[index]
    if type(template) is dict:
        parts = [(key, builder(value)) for key, value in template.items()]
        return lambda values: {key: part(values) for key, part in parts}
    if type(template) in {list, tuple}:
        items = [builder(value) for value in template]
        kind = type(template)
        return lambda values: kind(item(values) for item in items)
    found: list[int] = []
    renumbered(template, found.append)
    if not found:
        return lambda _: template
    return lambda values: renumbered(template, lambda index: values[index])


def renumbered(template: Any, replace: Callable[[int], Any]) -> Any:
    """A template with ``replace(index)`` in the place of every Reference."""
    return map_tensors(lambda t: t, template, other=lambda x: replace(x.index) if type(x) is Reference else x)
