"""The law of optimizers: ``optimizer_step`` gives the bits of a loop written by hand."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from steploop.core.optimizer import Optimizer
from steploop.core.state.train_state import TrainState
from steploop.core.steps.backward import backward_scaled
from steploop.core.steps.clip import unscale_and_clip
from steploop.core.steps.forward import forward_loss
from steploop.core.steps.objectives import Objective, read_objective
from steploop.core.steps.update import optimizer_step
from steploop.testing.state_comparison import require_same, values

__all__ = ["check_optimizer_equals_its_loop"]


def check_optimizer_equals_its_loop(
    optimizer: Optimizer,
    model: nn.Module,
    twin: nn.Module,
    batches: Sequence[Any],
    objective: Objective,
    *,
    max_norm: float = 1.0,
    donate: bool = True,
) -> None:
    """Law 16. Parameters, buffers and slots equal those of a loop written by hand.

        for x in xs:  zero_grad();  loss(twin, x).backward();  clip_grad_norm_;  torch's step()

    An optimizer that evaluates the loss itself gets a closure on both sides: ours of pure steps, the other one of the
    lines above without the last.

    Args:
        optimizer: the description; the loop uses torch's own object that it builds.
        model: trained through steploop.
        twin: an equal model without dropout, trained by hand.
        batches: of the run.
        objective: without random numbers.
        max_norm: of the clip.
        donate: which form of ``optimizer_step``.

    Example:
        >>> import copy
        >>> check_optimizer_equals_its_loop(optimizer, copy.deepcopy(model), copy.deepcopy(model), batches, objective)
    """
    state = TrainState.create(model, optimizer)
    trainable = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    theirs, _ = optimizer.build(trainable)
    twin.train()
    for index, batch in enumerate(batches):
        evaluate_again = partial(_with_gradients, batch=batch, objective=objective, max_norm=max_norm)
        if state.machine.needs_closure:
            state = optimizer_step(state, closure=evaluate_again, donate=donate)
        else:
            state = optimizer_step(evaluate_again(state), donate=donate)
        _step_by_hand(theirs, twin, batch, objective, max_norm)
        theirs.zero_grad()
        expected = {
            "params": {name: p.detach() for name, p in twin.named_parameters()},
            "buffers": dict(twin.named_buffers()),
            "slots": {name: dict(theirs.state[p]) for name, p in trainable.items()},
        }
        found = {field: values(state)[field] for field in expected}
        require_same(
            found, expected, f"after step {index} {optimizer} must equal itself in a loop written by hand"
        )


def _with_gradients(state: TrainState, batch: Any, objective: Objective, max_norm: float) -> TrainState:
    return unscale_and_clip(backward_scaled(forward_loss(state, batch, objective)), max_norm=max_norm)


def _step_by_hand(
    optimizer: torch.optim.Optimizer, model: nn.Module, batch: Any, objective: Objective, max_norm: float
) -> None:
    """One step as torch's tutorials write it; shares nothing with the step functions."""

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss, _, _ = read_objective(objective(model, batch))
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no types for it
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], max_norm)
        return loss

    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.step(closure)  # type: ignore[no-untyped-call]  # torch has no types for it
    else:
        closure()
        optimizer.step()
