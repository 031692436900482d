"""Modules of torch's ``fully_shard`` (FSDP2), which keep a pointer of their own to the shard of each parameter."""

import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from steploop.core.ranks import Ranks
from steploop.core.state.sharded import is_sharded
from steploop.errors import ConfigError

__all__ = ["ShardedModule", "settle_sharded", "sharded_module"]


class ShardedModule:
    """The parts of a model that ``fully_shard`` was applied to.

    Between steps the shards stand in the module, as DTensors. In a forward pass each part gathers its parameters and puts
    them in the places of the shards; the outermost part leaves them there until the backward pass is done. So whoever gives
    the module other values takes it back first, and then lets each part look at its places again.

    Attributes:
        names: of the parameters.
        ranks: who trains them; None: not known yet.
        counts: whether this rank's shards are those that count in a sum over all shards: replicas (HSDP) hold the same.
    """

    def __init__(self, parts: list[Any], names: Mapping[int, str]) -> None:
        self._parts = parts
        self._params: list[tuple[str, Any]] = []
        for part in parts:
            # FSDP computes the sum of gradients, not their mean: the weight of a part of a batch is in the loss.
            # Its mean over gloo is a sum that is divided afterwards; others have reported that it is not divided at all.
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
            if hasattr(part, "set_reduce_scatter_unused_params"):
                # what the loss of one rank does not depend on counts as zeros there, instead of a hang
                part.set_reduce_scatter_unused_params(True, recurse=False)
        self.ranks: Ranks | None = None
        self.take_back()
        for part in parts:
            for group in _groups(part):
                for param in group.fsdp_params:
                    self._params.append((names[id(param.sharded_param)], param))
        self.names = frozenset(name for name, _ in self._params)
        shard = self._params[0][1].sharded_param
        here = shard.device_mesh.get_coordinate()
        replicated = [i for i, placement in enumerate(shard.placements) if placement.is_replicate()]
        self.counts = here is not None and all(here[i] == 0 for i in replicated)

    def join(self, ranks: Ranks) -> None:
        """Let the parameters be trained by these ranks.

        Raises:
            ConfigError: the shards are not those of the ranks, or are kept in a way that a state cannot follow.
        """
        for name, param in self._params:
            shard = param.sharded_param
            mesh, cut = shard.device_mesh, [p for p in shard.placements if not p.is_replicate()]
            if mesh.size() != ranks.size or ranks.group is not None:
                raise ConfigError(
                    f"TrainState.create: {name} is sharded over {mesh.size()} processes, but the state has {ranks.size} ranks. Make the "
                    "mesh of all of them: init_device_mesh(device_type, (world_size,))."
                )
            if len(cut) != 1 or type(cut[0]).__name__ != "Shard":
                raise ConfigError(
                    f"TrainState.create: {name} is placed as {shard.placements}, and a state takes parameters that fully_shard alone has "
                    "cut, along one axis (FSDP2, or HSDP on a mesh of two dimensions), without tensor parallelism."
                )
            if param.offload_to_cpu:
                raise ConfigError(
                    f"TrainState.create: {name} is kept on the host between steps (CPUOffloadPolicy), where a state on {param.device} "
                    "cannot update it. Leave the policy out."
                )

        self.ranks = ranks

    def take_back(self) -> None:
        """Put the shards into their places, where a forward pass left whole parameters."""
        for part in self._parts:
            part.reshard()

    def look_again(self) -> None:
        """Let each part take what stands in its places as its shards."""
        for _, param in self._params:
            info = param._module_info
            if getattr(info.module, info.param_name) is not param.sharded_param:
                param.reset_sharded_param()

    def changed(self, *known: Mapping[str, Tensor]) -> str | None:
        """The name of a parameter whose shard is none of those that are known; None if there is none.

        Raises:
            ConfigError: nobody has said which ranks train the model.
        """
        if self.ranks is None:
            raise ConfigError(
                "The model is sharded (fully_shard), and a sharded model is trained by all its ranks together. Say so: "
                "TrainState.create(model, optimizer, ranks=Ranks.here())."
            )
        for name, param in self._params:
            info, shard = param._module_info, param.sharded_param
            here = info.module._parameters.get(info.param_name)
            whole = getattr(param, "_unsharded_param", None)
            if all(shard is not values[name] for values in known) or (
                here is not shard and here is not whole
            ):
                return name
        return None


def _groups(part: Any) -> list[Any]:
    state = part._get_fsdp_state()
    found = getattr(state, "_fsdp_param_groups", None)  # before torch 2.14 a module had one at most
    one = getattr(state, "_fsdp_param_group", None) if found is None else None
    return list(found) if found is not None else [one] if one is not None else []


def sharded_module(model: nn.Module) -> ShardedModule | None:
    """The parts of ``model`` that are sharded; None if there are none.

    Raises:
        ConfigError: a parameter that is trained belongs to none of them.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)
    parts = [] if kind is None else [module for module in model.modules() if isinstance(module, kind)]
    if not parts:
        return None
    for part in parts:
        part.reshard()
    params = dict(model.named_parameters())
    for name, param in params.items():
        if param.requires_grad and not is_sharded(param):
            raise ConfigError(
                f"TrainState.create: the parameter {name} is not sharded, and others are. Apply fully_shard(model) to the whole model "
                "last, after its layers."
            )
    return ShardedModule(parts, {id(param): name for name, param in params.items()})


def settle_sharded(machine: Any) -> None:
    """Refuse what a sharded model cannot do; what other models find out in their first pass is decided for it.

    Args:
        machine: of a state; one without a sharded model stays as it is.

    Raises:
        ConfigError: an optimizer that looks at whole parameters, or ranks that are not those of the shards.
    """
    sharded: ShardedModule | None = machine.module.sharded
    if sharded is None:
        return
    if machine.needs_closure or machine.has_modes:
        raise ConfigError(
            f"TrainState.create: {machine.optimizer_name} looks at all values of a parameter, and of a sharded one each rank has a part. "
            "Take an optimizer that updates every value by itself, such as AdamW or SGD."
        )
    machine.moved = ()  # there is no room for a copy of each parameter, and FSDP puts its own in their places
    machine.draws_elsewhere = True  # a pass that is taken again on one rank would wait for the others
    if machine.ranks is not None:
        sharded.join(machine.ranks)
