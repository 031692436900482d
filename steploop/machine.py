"""Machines: the live module and optimizer that compute, and whose values they hold at the moment.

A state holds values; a machine computes with them. Pointing a machine at a state's values is an assignment per
tensor, never a copy. Where a machine holds a state's values already, a step runs on it as it is; where it holds
another living state's, the values are lent to it for the length of one call and the others put back.
"""

import weakref
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer

__all__ = ["Lease", "Machine", "ModuleMachine", "module_machine"]


class Lease:
    """One ownership of a set of tensors: shared by the states that look at them, spent when they are given away."""

    __slots__ = ("__weakref__", "spent_by")

    def __init__(self) -> None:
        self.spent_by: str | None = None


class _Holder:
    """Remembers whose values a machine holds, without keeping them alive."""

    def __init__(self, lease: Lease | None = None) -> None:
        self._lease: weakref.ref[Lease] | None = None if lease is None else weakref.ref(lease)

    def holds(self, lease: Lease) -> bool:
        return self._lease is not None and self._lease() is lease

    def free(self) -> bool:
        """Whether nobody living owns the values that the machine holds."""
        lease = None if self._lease is None else self._lease()
        return lease is None or lease.spent_by is not None

    def give_to(self, lease: Lease) -> None:
        self._lease = weakref.ref(lease)


class ModuleMachine:
    """A module, the places in it where parameters and buffers stand, and the mode each submodule trains in."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.holder = _Holder()
        self.param_places = self._places("_parameters", dict(model.named_parameters()))
        self.buffer_places = self._places("_buffers", dict(model.named_buffers()))
        # A model left in eval mode is put back into training; a part put into eval mode on purpose, under a
        # training root, stays there (frozen BatchNorm).
        self.training = [m for m in model.modules() if m.training or not model.training]
        self.frozen = [m for m in model.modules() if model.training and not m.training]

    def _places(self, kind: str, values: Mapping[str, Tensor]) -> list[tuple[dict[str, Any], str, str]]:
        """(dictionary, key, name) wherever a value stands; a tied one stands in several places under one name."""
        names = {id(value): name for name, value in values.items()}
        return [
            (getattr(module, kind), key, names[id(value)])
            for module in self.model.modules()
            for key, value in getattr(module, kind).items()
            if value is not None
        ]

    def place_params(self, params: Mapping[str, Tensor]) -> None:
        """Point the module at these parameters."""
        for where, key, name in self.param_places:
            where[key] = params[name]

    def place_buffers(self, buffers: Mapping[str, Tensor]) -> None:
        """Point the module at these buffers."""
        for where, key, name in self.buffer_places:
            where[key] = buffers[name]

    def layout(self) -> list[tuple[int, str]]:
        """Where values stand: another layout means that something was added or taken away (a new head, say)."""
        return [(id(where), key) for where, key, _ in (*self.param_places, *self.buffer_places)]

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied module begins without a machine: nobody holds its values yet."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Likewise for one that is saved and loaded."""
        return type(None), ()

    def params(self) -> dict[str, Tensor]:
        """The parameters that the module points at."""
        return {name: where[key] for where, key, name in self.param_places}

    def buffers(self) -> dict[str, Tensor]:
        """The buffers that the module points at: a forward pass may have replaced them."""
        return {name: where[key] for where, key, name in self.buffer_places}

    def set_training(self, *, training: bool) -> None:
        """Put every submodule into the mode it trains in, or all into eval mode; costs nothing where it is so."""
        for module in self.training:
            if module.training is not training:
                module.training = training
        for module in self.frozen:
            if module.training:
                module.training = False

    def modes(self) -> list[tuple[nn.Module, bool]]:
        """What to hand to ``restore_modes``."""
        return [(m, m.training) for m in self.model.modules()]

    @staticmethod
    def restore_modes(modes: Sequence[tuple[nn.Module, bool]]) -> None:
        """Put every submodule back into the mode that was noted."""
        for module, training in modes:
            module.training = training

    def point(self, lease: Lease, params: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """Make the module hold ``params``; what has to be put back after the call, or None."""
        if self.holder.holds(lease):
            return None
        if self.holder.free():
            self.holder.give_to(lease)
            self.place_params(params)
            return None
        before = self.params()
        self.place_params(params)
        return before


_ATTRIBUTE = "_steploop_machine"


def module_machine(model: nn.Module) -> ModuleMachine:
    """The machine of ``model``: one per module, so that two states of one model know of each other.

    It stands in the module's own dictionary, where the garbage collector sees the cycle; a table of all modules
    would keep every one of them alive. Copying or saving the module leaves it behind.
    """
    machine = model.__dict__.get(_ATTRIBUTE)
    fresh = ModuleMachine(model)
    if not isinstance(machine, ModuleMachine) or machine.layout() != fresh.layout():
        model.__dict__[_ATTRIBUTE] = machine = fresh
    return machine


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
        self.default_dtype = torch.get_default_dtype()
        grouped = {name for names in group_names for name in names}
        self.trainable = tuple(name for name, _ in self.model.named_parameters() if name in grouped)
        self.rate_factors = _rate_factors(optimizer)
        self.holder = _Holder()
        self.rate_table: object = None  # kept by ``schedule``: a schedule's values on the device
        self._hyper: tuple[Mapping[str, Any], ...] | None = None
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
        return tuple({k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups)

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
            before = (optimizer.state, [list(g["params"]) for g in optimizer.param_groups], self._hyper)
        optimizer.state = defaultdict(dict, {params[name]: slot for name, slot in slots.items()})
        for group, names in zip(optimizer.param_groups, self.group_names, strict=True):
            group["params"][:] = [params[name] for name in names]  # in place: LBFGS keeps the list itself
        self._set_hyper(hyper)
        return before

    def put_back(self, before: "tuple[Any, ...] | None") -> None:
        """End a loan of the optimizer."""
        if before is None:
            return
        self.optimizer.state, params, hyper = before
        for group, values in zip(self.optimizer.param_groups, params, strict=True):
            group["params"][:] = values
        self._set_hyper(hyper)

    def _set_hyper(self, hyper: tuple[Mapping[str, Any], ...] | None) -> None:
        if hyper is not None and hyper is not self._hyper:
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
                optimizer.step(lambda: loss)
            elif _hooked(optimizer):
                optimizer.step()
            else:
                self._bare_step(optimizer)
        finally:
            for leaf in leaves:
                leaf.grad = None

    def pass_on(self, old: Lease, new: Lease) -> None:
        """After a donation the machine holds the values of the new owner, where it held the old one's."""
        for holder in (self.holder, self.module.holder):
            if holder.holds(old):
                holder.give_to(new)


def _rate_factors(optimizer: torch.optim.Optimizer) -> tuple[float, ...]:
    """lr of each group over the optimizer's own lr: the proportion that a schedule keeps."""
    if "lr" not in optimizer.defaults:
        return tuple(1.0 for _ in optimizer.param_groups)
    base = optimizer.defaults["lr"]
    # Adafactor may have lr=None and tensors are legal: the same object is in proportion 1 to itself
    return tuple(1.0 if g["lr"] is base or not base else float(g["lr"]) / float(base) for g in optimizer.param_groups)


def _hooked(optimizer: torch.optim.Optimizer) -> bool:
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
    )
