"""Gradient norms per layer group, on request: which part of a network learns, and which has gone quiet or wild."""

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from steploop.core.state.sharded import is_sharded
from steploop.core.state.train_state import TrainState
from steploop.core.steps.clipping import global_norm
from steploop.errors import ConfigError

__all__ = ["LayerNorms", "group_of", "layer_norms"]


def group_of(name: str, depth: int) -> str:
    """The layer group of a parameter: the first ``depth`` parts of its module's name; "(root)" for the model's own."""
    parts = name.split(".")[:-1]
    return ".".join(parts[:depth]) or "(root)"


def _check_depth(depth: int) -> None:
    if not isinstance(depth, int) or depth < 1:
        raise ConfigError(
            f"layer_norms: depth must be an integer >= 1, but is {depth!r}. 1 groups by the outermost modules."
        )


def layer_norms(grads: Mapping[str, Tensor], *, depth: int = 1) -> dict[str, Tensor]:
    """The L2 norm of the gradients of each layer group.

    With g_p the gradient of parameter p and G a group:  norm(G) = sqrt(Σ_(p in G) ||g_p||²)

    Args:
        grads: parameter name -> gradient, as ``state.grads`` has them: between ``unscale_and_clip`` and
            ``optimizer_step``, or before, still multiplied by the loss scale.
        depth: how many parts of the name make a group, >= 1.

    Returns:
        Group -> norm, shape (), on the device; in the order of the parameters.

    Raises:
        ConfigError: ``depth`` is < 1.
    """
    _check_depth(depth)
    groups: dict[str, list[Tensor]] = {}
    for name, grad in grads.items():
        groups.setdefault(group_of(name, depth), []).append(grad)
    with torch.no_grad():
        return {group: _whole(global_norm(members)) for group, members in groups.items()}


def _whole(norm: Tensor) -> Tensor:
    """The norm over all ranks where each holds a part of the gradients; every rank asks at the same step."""
    return norm.full_tensor() if is_sharded(norm) else norm  # type: ignore[attr-defined]  # a DTensor


class LayerNorms:
    """Reads the norms out of steps as they are taken, without a change to the train step.

    While it is entered, a hook of the optimizer looks at the gradients that the optimizer is given: unscaled and
    clipped. It computes them only after ``request()``, for one step. Outside of it, there is no hook and no cost.

    A step that is skipped on the CPU never reaches the optimizer; a compiled step takes no hooks.

    Args:
        states: the states whose optimizers to watch; their successors are watched too.
        depth: how many parts of a parameter's name make a group, >= 1.

    Raises:
        ConfigError: ``depth`` is < 1.
    """

    def __init__(self, states: Mapping[str, TrainState] | TrainState, *, depth: int = 1) -> None:
        _check_depth(depth)
        self._machines = {
            name: state.machine
            for name, state in (states.items() if isinstance(states, Mapping) else [("", states)])
        }
        self._depth = depth
        self._wanted = False
        self._handles: list[Any] = []
        self._found: dict[str, Tensor] = {}

    def __enter__(self) -> Self:
        """Put the hooks on."""
        for name, machine in self._machines.items():
            self._handles.append(
                machine.optimizer.register_step_pre_hook(self._hook(name, machine.group_names))
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take them off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, owner: str, names: Iterable[Iterable[str]]) -> Any:
        order = [list(group) for group in names]

        def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            if not self._wanted:
                return
            grads = {
                name: param.grad
                for group, own in zip(optimizer.param_groups, order, strict=True)
                for name, param in zip(own, group["params"], strict=True)
                if param.grad is not None
            }
            if any(type(grad) is not Tensor and not is_sharded(grad) for grad in grads.values()):
                return  # the step is being traced: these have no values, and the graph will run no hook
            prefix = f"{owner}." if owner else ""
            self._found |= {
                f"{prefix}{group}": norm for group, norm in layer_norms(grads, depth=self._depth).items()
            }

        return look

    def request(self) -> None:
        """Compute the norms of the next step."""
        self._wanted = True
        self._found = {}

    def read(self) -> dict[str, float]:
        """Group -> norm of the step after the last request; waits for the device. Empty where none was taken."""
        self._wanted = False
        return {group: float(norm) for group, norm in self._found.items()}
