"""Write the loop of a recipe by hand, and through other installed libraries."""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from steploop.core.precision import autocast
from steploop.core.state.train_state import TrainState
from steploop.core.steps.objectives import Objective, read_objective
from steploop.errors import ConfigError

__all__ = ["PEERS", "Step", "compiled_model_step", "handwritten_step", "installed_peers", "single"]

Step = Callable[[Any], Any]  # takes a batch, trains on it, gives the loss

MAX_NORM = 1.0  # any bound: clipping costs the same whether it bites or not
_FABRIC_PRECISION = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
_ACCELERATE_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


class _Parts:
    """The state's live model and optimizer, a scheduler, and an average if the state has one."""

    def __init__(self, state: TrainState) -> None:
        self.model = _training(state)
        self.optimizer = state.machine.optimizer
        self.params = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda _: 1.0)
        self.average = (
            None if state.ema is None else AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.999))  # type: ignore[no-untyped-call]  # torch's
        )

    def afterwards(self) -> None:
        """Do what follows the optimizer's step."""
        self.scheduler.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update_parameters(self.model)


def _training(state: TrainState) -> nn.Module:
    """Return the state's own module, in training mode."""
    model = state.model
    state.machine.module.set_training(training=True)
    return model


def handwritten_step(state: TrainState, objective: Objective, model: nn.Module | None = None) -> Step:
    """Make the usual PyTorch step, written out.

    Autocast around the objective, ``backward()``, ``clip_grad_norm_``, ``optimizer.step()``, a ``LambdaLR`` step and
    ``zero_grad()``; a ``GradScaler`` for fp16; ``AveragedModel`` where the recipe's state carries an average.

    Args:
        state: its model and optimizer are used as they are.
        objective: of the recipe.
        model: what the objective is called with, if not the state's model itself.
    """
    parts = _Parts(state)
    called = parts.model if model is None else model
    device_type = state.device.type
    scaler = torch.amp.GradScaler(device_type, enabled=state.precision == "fp16")

    def step(batch: Any) -> Any:
        with autocast(state.precision, device_type):
            loss, _, _ = read_objective(objective(called, batch))
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # torch's
        scaler.unscale_(parts.optimizer)
        nn.utils.clip_grad_norm_(parts.params, MAX_NORM)
        scaler.step(parts.optimizer)
        scaler.update()
        parts.afterwards()
        return loss

    def plain(batch: Any) -> Any:
        with autocast(state.precision, device_type):
            loss, _, _ = read_objective(objective(called, batch))
        loss.backward()  # type: ignore[no-untyped-call]  # torch's
        nn.utils.clip_grad_norm_(parts.params, MAX_NORM)
        parts.optimizer.step()
        parts.afterwards()
        return loss

    return step if state.precision == "fp16" else plain


def compiled_model_step(state: TrainState, objective: Objective) -> Step:
    """Make the usual step with ``torch.compile(model)``."""
    compiled: Any = torch.compile(_training(state))
    return handwritten_step(state, objective, compiled)


def fabric_step(state: TrainState, objective: Objective) -> Step:
    """Make the step through Lightning Fabric."""
    import lightning

    parts = _Parts(state)
    several = torch.distributed.is_initialized()  # this process is one of several ranks
    fabric = lightning.Fabric(
        accelerator=state.device.type,
        devices=torch.distributed.get_world_size() if several else 1,
        strategy="ddp" if several else "auto",
        precision=_FABRIC_PRECISION[state.precision],
    )
    if several:
        fabric.launch()
    model, optimizer = fabric.setup(parts.model, parts.optimizer)

    def step(batch: Any) -> Any:
        loss, _, _ = read_objective(objective(model, batch))
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=MAX_NORM)
        optimizer.step()
        parts.afterwards()
        return loss

    return step


def accelerate_step(state: TrainState, objective: Objective) -> Step:
    """Make the step through Accelerate."""
    from accelerate import Accelerator

    parts = _Parts(state)
    accelerator = Accelerator(
        cpu=state.device.type == "cpu", mixed_precision=_ACCELERATE_PRECISION[state.precision]
    )
    model, optimizer, scheduler = accelerator.prepare(parts.model, parts.optimizer, parts.scheduler)

    def step(batch: Any) -> Any:
        with accelerator.autocast():
            loss, _, _ = read_objective(objective(model, batch))
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if parts.average is not None:
            parts.average.update_parameters(parts.model)
        return loss

    return step


# name -> (distribution, module that must be importable, factory)
PEERS: dict[str, tuple[str, str, Callable[[TrainState, Objective], Step]]] = {
    "Fabric": ("lightning", "lightning", fabric_step),
    "Accelerate": ("accelerate", "accelerate", accelerate_step),
}


def installed_peers() -> list[str]:
    """List the other libraries that are installed here."""
    return [name for name, (_, module, _) in PEERS.items() if importlib.util.find_spec(module) is not None]


def single(state: Any, objective: Objective | None) -> tuple[TrainState, Objective]:
    """Return the single state and its objective, which a hand-written loop needs, or raise."""
    if not isinstance(state, TrainState) or objective is None:
        raise ConfigError(
            "bench: a hand-written loop needs a single state and Recipe.objective, and this recipe lacks one of them. "
            "Only its own step is measured."
        )
    return state, objective
