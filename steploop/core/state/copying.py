"""Copies of a state's values: parameters with their hooks and attributes, trees of tensors, lazy clones."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from steploop.core.state.parts import Began, TensorValues
from steploop.core.trees import map_tensors

__all__ = [
    "carry_hooks",
    "copy_began",
    "copy_leaf",
    "copy_tensors",
    "lazy_clone",
    "leaf_like",
    "plain_copy",
    "unchanged",
]


def copy_leaf(param: Tensor) -> Tensor:
    """Copy a parameter: a leaf of the same class, with the hooks and attributes of the original."""
    return leaf_like(param, param.detach().clone())


def leaf_like(param: Tensor, values: Tensor) -> Tensor:
    """Make ``values`` a leaf like ``param``: its class, its hooks, its attributes."""
    if type(param) is nn.Parameter:
        leaf: Tensor = nn.Parameter(values, requires_grad=param.requires_grad)
    elif isinstance(param, nn.Parameter) and type(values) is Tensor:
        leaf = torch.Tensor._make_subclass(type(param), values, param.requires_grad)
    elif isinstance(
        param, nn.Parameter
    ):  # a tensor that wraps others: it says itself what a Parameter of it is
        leaf = nn.Parameter(values, requires_grad=param.requires_grad)
    else:
        leaf = values.requires_grad_(param.requires_grad)
    carry_hooks(param, leaf)
    return leaf


def carry_hooks(old: Tensor, new: Tensor) -> None:
    """Give ``new`` the hooks and the attributes that hang on ``old``: gradient masks, tags of a library."""
    if old._backward_hooks:
        for hook in old._backward_hooks.values():
            new.register_hook(hook)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    if getattr(old, "_post_accumulate_grad_hooks", None):
        for hook in old._post_accumulate_grad_hooks.values():
            new.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    if old.__dict__:
        new.__dict__.update(old.__dict__)


def plain_copy(tree: Any) -> Any:
    """Copy a tree of tensors and plain values, containers included."""
    return map_tensors(lambda t: t.detach().clone(), tree)


def copy_tensors(values: TensorValues, trainable: tuple[str, ...]) -> TensorValues:
    """Copy every tensor and container of a state; fields that a subclass adds are copied like the others."""
    params = {name: copy_leaf(p) for name, p in values.params.items()}
    copies = {
        name: plain_copy(value)
        for name, value in vars(values).items()
        if name not in {"params", "leaves", "extra"}
    }
    return values.replace(
        **copies,
        params=params,
        extra=copy.deepcopy(values.extra) if values.extra else {},
        leaves=tuple(params[name] for name in trainable),
    )


def copy_began(began: Began, before: TensorValues, copies: TensorValues) -> Began:
    """Copy what a step began with, for the copy of a state in the middle of it.

    Args:
        began: of the state that was copied.
        before: the values of that state.
        copies: their copies; what the step has not changed is taken from them.
    """
    held = began.tensors
    changed = {
        name: plain_copy(value)
        for name, value in vars(held).items()
        if name not in {"params", "leaves"} and value is not getattr(before, name)
    }
    params = {
        name: copies.params[name] if p is before.params[name] else copy_leaf(p)
        for name, p in held.params.items()
    }
    return Began(copies.replace(**changed, params=params), plain_copy(began.overwritten))


def lazy_clone(tensor: Tensor) -> Tensor:
    """Clone a tensor, sharing its memory until one of the two is written to, where torch can do that."""
    try:
        return torch._lazy_clone(tensor.detach())
    except (AttributeError, RuntimeError, NotImplementedError):  # private, and not for every kind of tensor
        return tensor.detach().clone()


def unchanged(now: Tensor, before: Tensor) -> bool:
    """Whether a copy has its first value; one whose memory is still shared lazily was never written to."""
    if hasattr(torch._C, "_is_cow_tensor") and torch._C._is_cow_tensor(now):
        return True
    with torch.no_grad():
        return now.shape == before.shape and torch.equal(now.detach(), before)
