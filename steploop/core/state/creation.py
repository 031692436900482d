"""The fields of a first state: a model and an optimizer, checked, and the machine that computes with them."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from steploop.core.precision import LossScale, Precision, check_precision
from steploop.core.ranks import Ranks
from steploop.core.state.copying import copy_leaf
from steploop.core.state.machine import Machine
from steploop.core.state.module_machine import ModuleMachine, module_machine
from steploop.core.state.ownership import Lease
from steploop.core.state.parts import TensorValues
from steploop.core.state.same_start import refuse_wrapped, start_together
from steploop.core.state.sharded_module import settle_sharded
from steploop.core.state.shared_memory import shared_memory
from steploop.core.trees import unkeepable
from steploop.errors import ConfigError

__all__ = ["OptimizerDescription", "initial_values"]


class OptimizerDescription(Protocol):
    """What ``TrainState.create`` asks of an optimizer: ``steploop.Optimizer`` is one."""

    def build(
        self, params: Mapping[str, nn.Parameter]
    ) -> tuple[torch.optim.Optimizer, tuple[tuple[str, ...], ...]]:
        """The live optimizer over ``params``, and the parameter names of each of its groups."""
        ...


def initial_values(
    model: nn.Module,
    optimizer: OptimizerDescription,
    *,
    seed: int,
    precision: Precision,
    device: torch.device | str | None,
    memory_format: torch.memory_format | None,
    loss_scale: LossScale | None,
    ema: bool,
    ema_buffers: bool,
    carry: Any,
    ranks: Ranks | None,
) -> dict[str, Any]:
    """Make what ``TrainState.create`` passes to its constructor; see there for the arguments."""
    check_precision(precision)
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ConfigError(f"TrainState.create: seed must be an int in 0 .. 2**63 - 1, but is {seed!r}.")
    _refuse_unready(model)
    if ranks is not None:
        refuse_wrapped(model)
    _refuse_shared_memory(model)
    module = module_machine(model)
    shared = not module.holder.free()
    if device is not None or memory_format is not None:
        if shared:
            raise ConfigError(
                "TrainState.create: another state trains this model; clone or drop that one before moving it."
            )
        model.to(device=device, memory_format=memory_format)  # type: ignore[call-overload]  # None is allowed
        module = module_machine(model)
    params = {n: copy_leaf(p) if shared else p for n, p in model.named_parameters()}
    buffers = {n: b.clone() if shared else b for n, b in model.named_buffers()}
    where = _one_device([*params.values(), *buffers.values()])
    halves = {n: p.dtype for n, p in params.items() if p.dtype in {torch.float16, torch.bfloat16}}
    if precision == "fp16" and halves:
        name, dtype = next(iter(halves.items()))
        raise ConfigError(
            f"TrainState.create: {name} is {str(dtype).removeprefix('torch.')}. precision='fp16' computes in float16 under "
            "autocast and keeps parameters in float32: call model.float() first."
        )
    scale = (loss_scale or LossScale()) if precision == "fp16" else loss_scale
    trainable = {n: p for n, p in params.items() if p.requires_grad}
    live, group_names = optimizer.build(trainable)  # type: ignore[arg-type]  # leaves are Parameters here
    labels = optimizer.labels(trainable) if hasattr(optimizer, "labels") else (None,) * len(group_names)
    machine = Machine(module, live, group_names, labels, where)
    machine.ranks = ranks
    settle_sharded(machine)
    _check_extra_state(module)
    averaged = {**params, **buffers} if ema_buffers else params
    tensors = TensorValues(
        params=params,
        buffers=buffers,
        slots={name: live.state[params[name]] for name in machine.trainable},
        beside=machine.initial_beside(),
        extra=module.extra_state() if module.keeps_extra_state() else {},
        ema={n: p.detach().clone() for n, p in averaged.items()} if ema or ema_buffers else None,
        carry=carry,
        leaves=tuple(params[name] for name in machine.trainable),
    )
    if ranks is not None:
        start_together(
            ranks, "TrainState.create: another state is made", machine, tensors,
            seed=seed, precision=precision, scale=repr(scale), hyper=repr(machine.initial_hyper),
        )  # fmt: skip
    lease = Lease()
    machine.holder.give_to(lease)
    if not shared:
        module.holder.give_to(lease)
    return {
        "tensors": tensors,
        "machine": machine,
        "lease": lease,
        "hyper": machine.initial_hyper,
        "seed": seed,
        "precision": precision,
        "scale": scale,
    }


def _check_extra_state(module: ModuleMachine) -> None:
    """Refuse an extra state that no checkpoint could hold."""
    for name, value in (module.extra_state() if module.extras else {}).items():
        if (found := unkeepable(value)) is not None:
            raise ConfigError(
                f"TrainState.create: get_extra_state() of {name or 'the model'} gives a {type(found[1]).__name__} "
                f"({found[0].lstrip('.') or 'the whole'}), which a state cannot hold. Let it give tensors, numbers and texts, "
                "in lists, tuples and mappings."
            )


def _refuse_unready(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ConfigError(
                f"TrainState.create: {path or 'the model'} is a ScriptModule, whose tensors Python cannot exchange. Train the module that it "
                "was made of, and script that afterwards."
            )
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(value):
            raise ConfigError(
                f"TrainState.create: {name} is lazy and has no shape yet. Run the model on one batch first."
            )
        if value.is_inference():
            raise ConfigError(
                f"TrainState.create: {name} was made under torch.inference_mode(), and such tensors are never trained. Make the model "
                "outside of it."
            )
        if value.is_meta:
            raise ConfigError(
                f"TrainState.create: {name} is on the meta device. Call model.to_empty(device=...) and initialise it."
            )


def _refuse_shared_memory(model: nn.Module) -> None:
    """Before anything is moved or copied, which would untie them without a word."""
    shared = shared_memory(dict(model.named_parameters()), dict(model.named_buffers()))
    if shared is not None:
        raise ConfigError(
            f"TrainState.create: {shared[0]} and {shared[1]} lie in the same memory but are two tensors. A step would update "
            "it twice, and a copy or a checkpoint would untie them. To share a weight, assign the same Parameter in both "
            "places (head.weight = embedding.weight); else give one of them memory of its own with clone()."
        )


def _one_device(tensors: list[Tensor]) -> torch.device:
    devices = {t.device for t in tensors}
    if len(devices) > 1:
        raise ConfigError(
            f"TrainState.create: expected all parameters and buffers on one device, but found {sorted(map(str, devices))}. "
            "Pass device=... to move them."
        )
    return devices.pop() if devices else torch.device("cpu")
