"""Machines: the live module and optimizer that compute, and whose values they hold at the moment.

A state holds values; a machine computes with them. Pointing a machine at a state's values is an assignment per
tensor, never a copy. Where a machine holds a state's values already, a step runs on it as it is; where it holds
another living state's, the values are lent to it for the length of one call and the others put back.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer

from steploop.core.state.ownership import Holder, Lease, ModuleMachine

__all__ = ["Machine"]


# How an optimizer computes, not what: these stay with the machine, and a checkpoint loads under any of them.
_NOT_VALUES = {"params", "foreach", "fused", "capturable", "differentiable"}


class Machine:
    """What a state computes with: a module machine, a live optimizer, and static facts about both."""

    def __init__(
        self,
        module: ModuleMachine,
        optimizer: torch.optim.Optimizer,
        group_names: tuple[tuple[str, ...], ...],
        device: torch.device,
    ) -> None:
        self.module = module
        self.model = module.model
        self.optimizer = optimizer
        self.group_names = group_names
        self.device = device
        self.device_type = device.type  # the device makes a string each time that it is asked
        self.default_dtype = torch.get_default_dtype()
        grouped = {name for names in group_names for name in names}
        self.trainable = tuple(name for name, _ in self.model.named_parameters() if name in grouped)
        self.rate_factors = _rate_factors(optimizer)
        self.holder = Holder()
        self.generators: tuple[torch.Generator, ...] | None = None  # those that a forward pass may draw from
        self.seeds: dict[Any, Tensor] = {}  # kept by the backward pass: what the loss is differentiated with
        self.rate_table: object = None  # kept by ``schedule``: a schedule's values on the device
        self._hyper: tuple[Mapping[str, Any], ...] | None = None
        _settle_implementation(optimizer, device)
        # torch's own optimizers fill the dictionaries they are given; others may put new ones in their place
        self.replaces_slots = not type(optimizer).__module__.startswith("torch.optim")
        # torch wraps step() in a profiler annotation and a walk over hooks: 40 us of 95 on a small model. The
        # function underneath is torch's own step; the wrapped one is taken as soon as there is a hook.
        self._bare_step = getattr(type(optimizer).step, "__wrapped__", type(optimizer).step)

    @property
    def fused(self) -> bool:
        """Whether the optimizer can skip a step by itself, on the device, given ``found_inf``."""
        return bool(getattr(self.optimizer, "_step_supports_amp_scaling", False))

    def initial_hyper(self) -> tuple[dict[str, Any], ...]:
        """The hyperparameters of each group as values, in the order of the groups."""
        return tuple(
            {k: v for k, v in g.items() if k not in _NOT_VALUES} for g in self.optimizer.param_groups
        )

    def point_optimizer(
        self,
        lease: Lease,
        params: Mapping[str, Tensor],
        slots: Mapping[str, dict[str, Any]],
        hyper: tuple[Mapping[str, Any], ...],
    ) -> "tuple[Any, ...] | None":
        """Make the optimizer hold these values; what has to be put back after the call, or None."""
        if self.holder.holds(lease):
            self._set_hyper(hyper)
            return None
        optimizer, before = self.optimizer, None
        if self.holder.free():
            self.holder.give_to(lease)
        else:
            before = (optimizer.state, [(group, list(group["params"])) for group in optimizer.param_groups])
        optimizer.state = defaultdict(dict, {params[name]: slot for name, slot in slots.items()})
        for group, names in zip(optimizer.param_groups, self.group_names, strict=True):
            group["params"][:] = [params[name] for name in names]  # in place: LBFGS keeps the list itself
        self._set_hyper(hyper)
        return before

    def put_back(self, before: "tuple[Any, ...] | None") -> None:
        """End a loan of the optimizer; its hyperparameters are set before every use."""
        if before is None:
            return
        self.optimizer.state, groups = before
        for group, params in groups:
            group["params"][:] = params

    def _set_hyper(self, hyper: tuple[Mapping[str, Any], ...]) -> None:
        if hyper is not self._hyper:
            for group, values in zip(self.optimizer.param_groups, hyper, strict=True):
                group.update(values)
            self._hyper = hyper

    def step(self, leaves: Sequence[Tensor], grads: Sequence[Tensor | None], loss: Tensor | None) -> None:
        """One ``optimizer.step()`` with the gradients lent to the parameters; ``.grad`` is None afterwards."""
        for leaf, grad in zip(leaves, grads, strict=True):
            leaf.grad = grad
        optimizer = self.optimizer
        try:
            if isinstance(optimizer, torch.optim.LBFGS):
                optimizer.step(lambda: loss)  # type: ignore[no-untyped-call]  # torch leaves it untyped
            elif _hooked(optimizer):
                optimizer.step()
            else:
                self._bare_step(optimizer)
        finally:
            for leaf in leaves:
                leaf.grad = None


def _rate_factors(optimizer: torch.optim.Optimizer) -> tuple[float, ...]:
    """The lr of each group over the optimizer's own lr: the proportion that a schedule keeps."""
    base = optimizer.defaults.get("lr")
    # no rate of its own (others' Adafactor has lr=None), or one of 0: there is no proportion to keep
    return tuple(float(group["lr"]) / float(base) if base else 1.0 for group in optimizer.param_groups)


def _settle_implementation(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Decide once what torch decides anew at every step, looking at every tensor: on a CPU it takes the plain loop."""
    if device.type != "cpu":
        return
    for group in optimizer.param_groups:
        if "foreach" in group and group["foreach"] is None and not group.get("fused"):
            group["foreach"] = False


def _hooked(optimizer: torch.optim.Optimizer) -> bool:
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
    )
