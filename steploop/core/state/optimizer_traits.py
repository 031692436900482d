"""What a machine asks of an optimizer once, when the state is made: how it steps, its modes, the proportion of its rates."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import optimizer as torch_optimizer

__all__ = ["bare_step", "has_modes", "hooked", "rate_factors", "requires_closure", "settle_implementation"]


def rate_factors(optimizer: torch.optim.Optimizer) -> tuple[float, ...]:
    """The lr of each group over the optimizer's own lr: the proportion that a schedule keeps."""
    base = optimizer.defaults.get("lr") or optimizer.param_groups[0].get("lr")
    # no rate of its own (others' Adafactor has lr=None), or one of 0: there is no proportion to keep
    return tuple(
        float(group["lr"]) / float(base) if base and group.get("lr") is not None else 1.0
        for group in optimizer.param_groups
    )


def has_modes(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer computes with other parameters in training than those it is judged by."""
    return all(callable(getattr(optimizer, mode, None)) for mode in ("train", "eval"))


def bare_step(optimizer: torch.optim.Optimizer) -> Callable[..., Any]:
    """The function underneath ``step()``; the wrapped one is taken as soon as there is a hook.

    torch wraps it in a profiler annotation and a walk over hooks: 40 us of 95 on a small model. What is under these
    switches the grad mode off in its own optimizers, by two objects that cost 10,000 instructions.
    """
    step: Callable[..., Any] = getattr(type(optimizer).step, "__wrapped__", type(optimizer).step)
    inner = getattr(step, "__wrapped__", None)
    own = type(optimizer).__module__.startswith("torch.optim")
    if inner is None or not own or optimizer.defaults.get("differentiable"):
        return step

    @functools.wraps(step)
    def without_grad(*args: Any) -> Any:
        before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)  # noqa: FBT003  (as torch declares it)
        try:
            return inner(*args)
        finally:
            torch._C._set_grad_enabled(before)

    return without_grad


def requires_closure(step: Callable[..., Any]) -> bool:
    """Whether ``step`` cannot be called without a closure."""
    parameter = inspect.signature(step).parameters.get("closure")
    return parameter is not None and parameter.default is inspect.Parameter.empty


def settle_implementation(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Decide once what torch decides anew at every step, looking at every tensor: on a CPU it takes the plain loop."""
    if device.type != "cpu" or not type(optimizer).__module__.startswith("torch.optim"):
        return
    for group in optimizer.param_groups:
        if "foreach" in group and group["foreach"] is None and not group.get("fused"):
            group["foreach"] = False


def hooked(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a hook has to be called at a step, of this optimizer or of all."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
    )
