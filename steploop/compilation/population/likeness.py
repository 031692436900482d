"""Say of functions and models whether they are alike, so that one trace does for both."""

import types
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor, nn

__all__ = ["likeness_of"]

_MOST_DEEP = 8
_OF_STATES = {"_parameters", "_buffers"}  # their values are the state's


def likeness_of(value: Any, depth: int = 0) -> Any:  # noqa: C901, PLR0911  (one return for each kind)
    """A description: equal ones are of things that compute alike. What is not understood is described by its identity.

    Functions are alike that have the same code, and alike closures and defaults; modules whose classes, attributes and
    children are alike, whatever the values of their parameters and buffers.
    """
    kind = type(value)
    if value is None or kind in {
        bool,
        int,
        float,
        complex,
        str,
        bytes,
        torch.dtype,
        torch.device,
        torch.Size,
    }:
        return (kind, repr(value) if kind in {float, complex} else value)
    if depth > _MOST_DEEP:
        return id(value)
    deeper = depth + 1
    if isinstance(value, nn.Module):
        return _of_module(value, deeper)
    if kind is types.FunctionType:
        return _of_function(value, deeper)
    if kind is types.MethodType:
        return ("method", value.__func__.__qualname__, likeness_of(value.__self__, deeper))
    if kind is partial:
        parts = (value.func, value.args, value.keywords)
        return ("partial", *(likeness_of(part, deeper) for part in parts))
    if kind in {list, tuple}:
        return (kind, *(likeness_of(item, deeper) for item in value))
    if kind is set:
        return (kind, *sorted(repr(likeness_of(item, deeper)) for item in value))
    if kind is dict or kind is OrderedDict:
        return (kind, *((repr(key), likeness_of(item, deeper)) for key, item in value.items()))
    if attrs.has(kind):
        return (kind, *(likeness_of(getattr(value, f.name), deeper) for f in attrs.fields(kind)))
    return id(value)


def _of_module(module: nn.Module, depth: int) -> Any:
    own = {k: v for k, v in vars(module).items() if k not in _OF_STATES and k != "_modules"}
    tensors = tuple(
        (name, None if t is None else (tuple(t.shape), t.dtype, t.requires_grad))
        for name in sorted(_OF_STATES)
        for name, t in vars(module)[name].items()
    )
    return (
        type(module),
        *((k, likeness_of(v, depth)) for k, v in own.items() if k != "_steploop_machine"),
        tensors,
        *((k, likeness_of(child, 0)) for k, child in vars(module)["_modules"].items()),
    )


def _of_function(function: Callable[..., Any] | Any, depth: int) -> Any:
    cells = [_content(cell) for cell in function.__closure__ or ()]
    return (
        function.__code__,
        id(function.__globals__),
        likeness_of(cells, depth),
        likeness_of(list(function.__defaults__ or ()), depth),
        likeness_of(dict(function.__kwdefaults__ or {}), depth),
    )


def _content(cell: types.CellType) -> Any:
    try:
        content = cell.cell_contents
    except ValueError:  # an empty one
        return None
    return content if not isinstance(content, Tensor) else id(content)
