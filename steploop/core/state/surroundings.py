"""Shields a step function from what its caller left switched on: autocast, inference mode, another default dtype.

Backward passes under autocast compute in its dtype, tensors made in inference mode can never be trained on again, and
torch's optimizers make their counters in the default dtype. A step is a function of the state: none of it gets in.

Nor does the order in which threads come: on a CPU ``index_put_(accumulate=True)``, the backward pass of ``x[indices]``,
adds from several threads as they come, unless torch is told to be deterministic.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch
from torch import get_default_dtype, is_autocast_enabled, is_grad_enabled, is_inference_mode_enabled

try:
    # asked at every step function: for a device it costs three times as much
    from torch._C import _is_any_autocast_enabled as any_autocast
except ImportError:  # it is private, and may go

    def any_autocast() -> bool:
        """Autocast may be on for some device."""
        return True


__all__ = ["DefaultDtype", "is_usual", "shield", "shielded", "shielded_sums", "sums_in_order"]

_deterministic: Any = torch._C._get_deterministic_algorithms
_set_deterministic: Any = torch._C._set_deterministic_algorithms
_fills: Any = torch._C._get_deterministic_fill_uninitialized_memory
_set_fills: Any = torch._C._set_deterministic_fill_uninitialized_memory

P = ParamSpec("P")
R = TypeVar("R")


class _Machine(Protocol):
    device_type: str
    default_dtype: torch.dtype


class _State(Protocol):
    @property
    def machine(self) -> Any: ...


S = TypeVar("S", bound=_State)


class DefaultDtype:
    """Another default dtype for a while."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def __enter__(self) -> None:
        self._before = torch.get_default_dtype()
        torch.set_default_dtype(self._dtype)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(self._before)


def is_usual(machine: _Machine) -> bool:
    """Whether nothing around the call would get into a step of ``machine``."""
    return (
        get_default_dtype() is machine.default_dtype
        and not is_inference_mode_enabled()
        and not (any_autocast() and is_autocast_enabled(machine.device_type))
    )


def shield(machine: _Machine) -> ExitStack:
    """Keep autocast, inference mode and default dtype of the caller out of a ``with`` block."""
    stack = ExitStack()
    if torch.is_inference_mode_enabled():
        stack.enter_context(torch.inference_mode(mode=False))
    stack.enter_context(DefaultDtype(machine.default_dtype))
    if torch.is_autocast_enabled(machine.device_type):
        # The caller's autocast keeps its casts of the parameters until it ends. We change the parameters, so that
        # neither we nor the caller may find the old ones there.
        torch.clear_autocast_cache()
        stack.callback(torch.clear_autocast_cache)
        stack.enter_context(torch.autocast(machine.device_type, enabled=False))
    return stack


@contextmanager
def sums_in_order(device_type: str) -> Iterator[None]:
    """Let every sum on a CPU be taken in one order; leave a GPU, where that costs time, to the caller's choice."""
    if device_type != "cpu" or _deterministic():
        yield
        return
    fills = _fills()
    try:
        _begin_order()
        yield
    finally:
        _end_order(fills=fills)


def _begin_order() -> None:
    _set_fills(False)  # noqa: FBT003  (empty tensors stay empty)
    _set_deterministic(True, warn_only=True)  # noqa: FBT003


def _end_order(*, fills: bool) -> None:
    _set_fills(fills)
    _set_deterministic(False)  # noqa: FBT003


def shielded(function: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """A step function whose result does not depend on autocast, inference mode and default dtype around the call.

    In the usual surroundings this costs half a microsecond.
    """
    return _shielded(function, sums=False)


def shielded_sums(function: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """The same for a function that runs code of the user's, or its backward pass: its sums are taken in one order."""
    return _shielded(function, sums=True)


def _shielded(function: Callable[Concatenate[S, P], R], *, sums: bool) -> Callable[Concatenate[S, P], R]:
    @functools.wraps(function)
    def call(state: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        machine: _Machine = state.machine
        if (  # as is_usual says, without a call
            get_default_dtype() is machine.default_dtype
            and not is_inference_mode_enabled()
            and not (any_autocast() and is_autocast_enabled(machine.device_type))
        ):
            grad = is_grad_enabled()
            order = sums and machine.device_type == "cpu" and not _deterministic()
            fills = order and _fills()
            try:
                try:
                    if order:
                        _begin_order()
                    return function(state, *args, **kwargs)
                finally:
                    if order:
                        _end_order(fills=fills)
            finally:
                if order and _deterministic():  # an interruption came before
                    _end_order(fills=fills)
                # an exception between the switch of a grad mode and the `with` that undoes it would leave it switched
                if is_grad_enabled() is not grad:
                    torch.set_grad_enabled(grad)
        with shield(machine), sums_in_order(machine.device_type if sums else ""):
            return function(state, *args, **kwargs)

    return call
