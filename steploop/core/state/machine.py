"""Machines: the live module and optimizer that compute, and whose values they hold at the moment.

A state holds values; a machine computes with them. Pointing a machine at a state's values is an assignment per
tensor, never a copy. Where a machine holds a state's values already, a step runs on it as it is; where it holds
another living state's, the values are lent to it for the length of one call and the others put back.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from steploop.core.ranks import Ranks
from steploop.core.state.module_machine import ModuleMachine
from steploop.core.state.optimizer_state import (
    STATIC,
    attributes_of,
    check_hyper,
    check_keepable,
    restore_attributes,
)
from steploop.core.state.optimizer_traits import (
    bare_step,
    has_modes,
    hooked,
    rate_factors,
    requires_closure,
    settle_implementation,
)
from steploop.core.state.ownership import Holder, Lease
from steploop.core.state.parts import TensorValues
from steploop.errors import ConfigError

__all__ = ["Machine"]


# How an optimizer computes, not what: these stay with the machine, and a checkpoint loads under any of them.
_NOT_VALUES = {"params", "foreach", "fused", "capturable", "differentiable"}


class Machine:
    """What a state computes with: a module machine, a live optimizer, and static facts about both.

    Attributes:
        buffer_shapes: buffer name -> its shape when the state was made.
        optimizer_name: the name of the optimizer's class; of several with a plus in between.
        group_names: the names of the parameters of each group.
        group_labels: the selector of each group as it was written, if that is a text.
        trainable: the names of the parameters that the optimizer has, in the order of the model.
        not_trained: the names of the others.
        rate_factors: the learning rate of each group over the optimizer's own.
        initial_hyper: the hyperparameters of each group at the beginning.
        third_party: whether the optimizer is no class of torch.optim, so that what it keeps is read back.
        members: the optimizers of a set of several classes; else the one.
        needs_closure: whether its ``step`` evaluates the loss itself.
        moved: the names of parameters that the model's forward pass changes; None before the first pass.
        draws_elsewhere: whether forward passes draw from Python's or NumPy's generators; None before the first.
        ranks: the processes that compute together; None if this is the only one.
        recomputes: whether a backward pass writes into buffers (activation checkpointing); None before the first.
    """

    def __init__(
        self,
        module: ModuleMachine,
        optimizer: torch.optim.Optimizer,
        group_names: tuple[tuple[str, ...], ...],
        group_labels: tuple[str | None, ...],
        device: torch.device,
    ) -> None:
        self.module = module
        self.ranks: Ranks | None = None
        self.model = module.model
        self.optimizer = optimizer
        self.group_names = group_names
        self.group_labels = group_labels
        self.buffer_shapes = {name: tuple(b.shape) for name, b in self.model.named_buffers()}
        self.device = device
        self.device_type = device.type  # the device makes a string each time that it is asked
        self.default_dtype = torch.get_default_dtype()
        grouped = {name for names in group_names for name in names}
        names = [name for name, _ in self.model.named_parameters()]
        self.trainable = tuple(name for name in names if name in grouped)
        self.not_trained = tuple(name for name in names if name not in grouped)
        self.moved: tuple[str, ...] | None = None
        self.recomputes: bool | None = None
        self.rate_factors = rate_factors(optimizer)
        self.uniform = all(factor == 1.0 for factor in self.rate_factors)
        # kept by ``schedule``: the schedule of each group, or None where one value holds for all
        self.group_rates: tuple[Any, list[Any] | None] | None = None
        self.holder = Holder()
        self.generators: tuple[torch.Generator, ...] | None = None  # those that a forward pass may draw from
        self.draws_elsewhere: bool | None = None
        self.seeds: dict[Any, Tensor] = {}  # kept by the backward pass: what the loss is differentiated with
        self.buckets: dict[Any, Any] = {}  # kept by the sums over ranks: how tensors are sent
        self.rate_table: object = None  # kept by ``schedule``: a schedule's values on the device
        # what the groups hold, where they hold a state's; what was written to them last
        self._hyper: tuple[Mapping[str, Any], ...] | None = None
        self._written: tuple[Mapping[str, Any], ...] | None = None
        self._pointed: Mapping[str, Tensor] | None = None  # the parameters that the optimizer holds
        settle_implementation(optimizer, device)
        # torch's own optimizers keep all state with their parameters, in the dictionaries that they are given
        members: tuple[torch.optim.Optimizer, ...] = getattr(optimizer, "members", (optimizer,))
        self.optimizer_name = "+".join(type(m).__name__ for m in members)
        self.third_party = any(not type(m).__module__.startswith("torch.optim") for m in members)
        self._bare_step = bare_step(optimizer)
        self.needs_closure = isinstance(optimizer, torch.optim.LBFGS) or requires_closure(self._bare_step)
        # schedule-free optimizers compute with other parameters than those they are judged by
        self.members = members
        self.has_modes = any(has_modes(member) for member in members)
        self.set_mode("train")
        self.initial_hyper = self.read_hyper()
        check_hyper(optimizer, self.initial_hyper)
        self._written = self.initial_hyper
        if self.third_party:
            for member in members:
                check_keepable(member, self.initial_hyper)
            self.initial_attributes = self._attributes()

    @property
    def fused(self) -> bool:
        """Whether the optimizer can skip a step by itself, on the device, given ``found_inf``."""
        return bool(getattr(self.optimizer, "_step_supports_amp_scaling", False))

    def read_hyper(self) -> tuple[dict[str, Any], ...]:
        """What each group holds besides its parameters, in the order of the groups."""
        return tuple(
            {k: v for k, v in g.items() if k not in _NOT_VALUES and not isinstance(v, STATIC)}
            for g in self.optimizer.param_groups
        )

    def initial_beside(self) -> dict[str, Any]:
        """What the optimizer keeps besides parameters and groups at the beginning."""
        return self.read_beside() if self.third_party else {}

    def read_beside(self) -> dict[str, Any]:
        """What the optimizer keeps under keys that are no parameters, and as attributes of its own."""
        found: dict[str, Any] = {}
        if keys := {k: v for k, v in self.optimizer.state.items() if not isinstance(k, Tensor)}:
            found["state"] = keys
        if attributes := self._attributes():
            found["attributes"] = attributes
        return found

    def _attributes(self) -> dict[str, Any]:
        """Attributes of the optimizer; of several, those of each under its number."""
        if len(self.members) == 1:
            return attributes_of(self.optimizer)
        return {str(i): found for i, member in enumerate(self.members) if (found := attributes_of(member))}

    def _restore_attributes(self, values: Mapping[str, Any]) -> None:
        if len(self.members) == 1:
            restore_attributes(self.optimizer, values)
            return
        for number, some in values.items():
            restore_attributes(self.members[int(number)], some)

    def set_mode(self, mode: Literal["train", "eval"]) -> None:
        """Put optimizers that have modes into one."""
        for member in self.members:
            if has_modes(member):
                getattr(member, mode)()

    # -- whose values the optimizer holds -------------------------------------------------------------------------

    def point_optimizer(
        self, lease: Lease, tensors: TensorValues, hyper: tuple[Mapping[str, Any], ...]
    ) -> Callable[[], None] | None:
        """Make the optimizer hold these values; a function that puts the others back after the call, or None."""
        holds = self.holder.holds(lease)
        own = holds or self.holder.free()
        if own and self._pointed is tensors.params and not self.third_party:
            if not holds:
                self.holder.give_to(lease)
            self._set_hyper(hyper)
            return None
        put_back = self._putting_back()
        self._put(tensors, hyper)
        if own:
            self.holder.give_to(lease)
            self._pointed = tensors.params
            return None
        return put_back

    def _putting_back(self) -> Callable[[], None]:
        """A function that makes the optimizer hold again what it holds now."""
        optimizer, pointed = self.optimizer, self._pointed
        before = (optimizer.state, [(group, list(group["params"])) for group in optimizer.param_groups])

        def put_back() -> None:
            optimizer.state, groups = before
            for group, others in groups:
                group["params"][:] = others
            self._hyper, self._pointed = None, pointed

        return put_back

    def keep(self) -> Callable[[], None]:
        """A function that puts module and optimizer back as they are now, groups and implementation included."""
        put_module_back, put_back = self.module.keep(), self._putting_back()
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        owner, written = self.holder.owner(), self._written

        def restore() -> None:
            put_module_back()
            put_back()
            self._written = None  # an exception half-way leaves values that are not known
            for group, before in zip(self.optimizer.param_groups, groups, strict=True):
                group.update(before)
            self._written = written
            self.holder.restore(owner)

        return restore

    def _put(self, tensors: TensorValues, hyper: tuple[Mapping[str, Any], ...]) -> None:
        """Put values into the optimizer."""
        self._pointed = None  # an exception half-way leaves values that are not known
        optimizer, params = self.optimizer, tensors.params
        optimizer.state = defaultdict(dict, {params[name]: slot for name, slot in tensors.slots.items()})
        for group, names in zip(optimizer.param_groups, self.group_names, strict=True):
            group["params"][:] = [params[name] for name in names]  # in place: LBFGS keeps the list itself
        if self.third_party:
            optimizer.state.update(tensors.beside.get("state", {}))
            self._restore_attributes(tensors.beside.get("attributes", self.initial_attributes))
        self._set_hyper(hyper)

    @contextmanager
    def lent(self, tensors: TensorValues, hyper: tuple[Mapping[str, Any], ...]) -> Iterator[None]:
        """Let the optimizer hold other values for the length of a ``with`` block."""
        put_back = self._putting_back()
        try:
            self._put(tensors, hyper)
            yield
        finally:
            put_back()

    def _set_hyper(self, hyper: tuple[Mapping[str, Any], ...]) -> None:
        if hyper is not self._hyper:
            self._hyper = self._written = None
            for group, values in zip(self.optimizer.param_groups, hyper, strict=True):
                if self.third_party:  # what another state's optimizer added to its groups is not this one's
                    for key, value in list(group.items()):
                        if key not in values and key not in _NOT_VALUES and not isinstance(value, STATIC):
                            del group[key]
                group.update(values)
            self._hyper = self._written = hyper

    def check_groups(self) -> None:
        """Raise ConfigError if somebody set a value of a group behind the state; those of others' optimizers are read back."""
        if self._written is None or self.third_party:
            return
        for index, (group, values) in enumerate(zip(self.optimizer.param_groups, self._written, strict=True)):
            for key, value in values.items():
                if group.get(key) is not value:
                    raise ConfigError(
                        f"{key!r} of parameter group {index} was set to {group.get(key)!r} behind the state, which has {value!r}: a copied or "
                        "resumed run would go on with that. Set a learning rate with schedule(state, ...), in the place of a scheduler of "
                        "torch; another hyperparameter with attrs.evolve(state, hyper=...)."
                    )

    def forget_hyper(self) -> None:
        """Note that the optimizer may have changed its groups."""
        self._hyper = None

    def step(
        self,
        leaves: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        closure: Callable[[], Any] | None = None,
    ) -> None:
        """One ``optimizer.step()`` with the gradients lent to the parameters; ``.grad`` is None afterwards."""
        for leaf, grad in zip(leaves, grads, strict=True):
            leaf.grad = grad
        optimizer = self.optimizer
        try:
            if closure is not None:
                optimizer.step(closure)
            elif hooked(optimizer) or "step" in vars(optimizer):
                optimizer.step()
            else:
                self._bare_step(optimizer)
        finally:
            for leaf in leaves:
                leaf.grad = None

    def check_frozen(self, params: Mapping[str, Tensor]) -> None:
        """Raise ConfigError if a parameter that the optimizer does not have requires a gradient now."""
        for name in self.not_trained:
            if params[name].requires_grad:
                raise ConfigError(
                    f"The parameter {name} requires a gradient, but it did not when the state was made: no optimizer has it. "
                    "After thawing it, make a new state with TrainState.create(model, optimizer)."
                )
