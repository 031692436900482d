"""Laws of an objective: every parameter is reached by a gradient, and one batch can be learned by heart."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from steploop.core.optimizer import Optimizer
from steploop.core.state.train_state import TrainState
from steploop.core.steps.backward import backward_scaled
from steploop.core.steps.clip import unscale_and_clip
from steploop.core.steps.forward import forward_loss
from steploop.core.steps.objectives import Objective
from steploop.core.steps.update import optimizer_step
from steploop.testing.state_comparison import State, Step, clone, members, require

__all__ = ["check_every_parameter_is_reached", "check_one_batch_is_learned", "check_step_lowers_the_loss"]


def check_every_parameter_is_reached(step: Step, state: State, batches: Sequence[Any]) -> None:
    """Within a few steps every trainable parameter gets a gradient that is not 0.

    Seen at the parameters themselves while the step runs, so it holds for any step, with one state or several.

    Args:
        step: any step.
        state: is left whole.
        batches: a few; a weight that is initialised to 0 may hide another one in the first step. Of several states, those
            that take no step in these batches are not judged.

    Example:
        >>> check_every_parameter_is_reached(train_step, state, batches)
    """
    current = clone(state)
    unreached = {(part, name) for part, s in members(current).items() for name in s.machine.trainable}
    for batch in batches:
        watched = [
            leaf.register_hook(_Watch(unreached, (part, name)))  # type: ignore[no-untyped-call]  # torch has no types
            for part, s in members(current).items()
            for name, leaf in s.params.items()
            if (part, name) in unreached
        ]
        try:
            current = step(current, batch)
        finally:
            for handle in watched:
                handle.remove()
    moved = {
        part
        for part, s in members(current).items()
        if s.attempted_steps > members(state)[part].attempted_steps
    }
    names = [f"{part}.{name}" if part else name for part, name in sorted(unreached) if part in moved]
    require(
        not names,
        f"every parameter must get a gradient, but none reached {', '.join(names)} in {len(batches)} steps. Use it in forward, look for "
        "detach() and torch.no_grad() on the way, or freeze it with requires_grad_(False).",
    )


class _Watch:
    """A hook that marks a parameter as reached when its gradient is not 0."""

    def __init__(self, unreached: set[tuple[str, str]], key: tuple[str, str]) -> None:
        self._unreached = unreached
        self._key = key

    def __call__(self, grad: Tensor) -> None:
        if grad.is_sparse or grad.any():
            self._unreached.discard(self._key)


def check_one_batch_is_learned(
    objective: Objective,
    state: TrainState,
    batch: Any,
    *,
    max_steps: int = 300,
    part: float = 0.5,
    rates: Sequence[float] = (1e-3, 1e-2, 1e-1),
) -> None:
    """Repeating one small batch brings its loss below ``part`` of the first one.

        min over t <= T of loss(fold(adam, [x] * T, s)) <= loss(s) - (1 - part) |loss(s)|

    A loss that cannot do that is not computed from what the model gives, has the wrong sign, or has a floor.

    Args:
        objective: of the recipe.
        state: where to begin; is left whole. Its optimizer and its schedule play no part here: Adam does.
        batch: small.
        max_steps: T, for each learning rate.
        part: how far the loss has to fall.
        rates: learning rates of Adam, tried in turn until one does it.

    Example:
        >>> check_one_batch_is_learned(objective, state, batch)
    """
    first, lowest = torch.inf, torch.inf
    for rate in rates:
        current = _adams(state, rate)
        for step in range(max_steps):
            current = forward_loss(current, batch, objective)
            loss = float(current.loss) if current.loss is not None else torch.nan
            if step == 0:
                first = loss
            lowest = min(lowest, loss)
            if lowest <= first - (1 - part) * abs(first):
                return
            current = optimizer_step(
                unscale_and_clip(backward_scaled(current), max_norm=torch.inf), max_nonfinite_steps=10**9
            )
    raise AssertionError(
        f"one batch must be learnable by heart, but its loss of {first:.4g} fell to {lowest:.4g} at best within {max_steps} steps of Adam "
        f"(rates {', '.join(f'{r:g}' for r in rates)}). Look at the sign of the loss, at a softmax before cross entropy, and at how the "
        "labels are matched with."
    )


def check_step_lowers_the_loss(step: Step, state: TrainState, batch: Any, *, max_steps: int = 50) -> None:
    """Repeating the recipe's own step on one batch lowers its loss.

    A step that cannot do that goes uphill, or nowhere: a sign, a learning rate of 0 or one that is far too high.

    Args:
        step: any step.
        state: where to begin; is left whole.
        batch: small.
        max_steps: how many steps it has for that.

    Example:
        >>> check_step_lowers_the_loss(train_step, state, batch)
    """
    current, losses = state.clone(), []
    for _ in range(max_steps):
        current = step(current, batch)
        losses.append(math.nan if current.loss is None else float(current.loss))
        if losses[-1] < losses[0]:
            return
    raise AssertionError(
        f"the train step must lower the loss of one batch, but it went from {losses[0]:.4g} to {losses[-1]:.4g} in {max_steps} steps and was "
        "never lower. Look at the sign of the loss and at the learning rate."
    )


def _adams(state: TrainState, rate: float) -> TrainState:
    """Give a copy of the model the same values and a fresh Adam."""
    model = copy.deepcopy(state.clone().model)
    return TrainState.create(
        model, Optimizer(torch.optim.Adam, lr=rate), seed=state.seed, precision=state.precision
    )
