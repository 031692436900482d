"""Restore a module and an optimizer after a trace, which lends them fake tensors."""

from collections.abc import Iterator
from contextlib import contextmanager

from steploop.core.state.machine import Machine

__all__ = ["restored"]


@contextmanager
def restored(machine: Machine) -> Iterator[None]:
    """Restore a module and an optimizer after a trace, which lends them fake tensors."""
    module, optimizer = machine.module, machine.optimizer
    params, buffers, modes = module.params(), module.buffers(), module.modes()
    groups = [{**group, "params": list(group["params"])} for group in optimizer.param_groups]
    held = (module.holder._lease, machine.holder._lease, machine._hyper, optimizer.state)
    try:
        yield
    finally:
        module.place_params(params)
        module.place_buffers(buffers)
        module.restore_modes(modes)
        module.holder._lease, machine.holder._lease, machine._hyper, optimizer.state = held
        for group, before in zip(optimizer.param_groups, groups, strict=True):
            group["params"][:] = before.pop("params")
            group.update(before)
