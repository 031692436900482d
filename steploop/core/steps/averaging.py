"""EMA: the exponential moving average of the weights, as one more step function."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from steploop.core.state.sharded import local_part
from steploop.core.state.surroundings import shielded
from steploop.core.state.trace import trace_of
from steploop.core.state.train_state import TrainState
from steploop.core.steps.judged_params import params_to_evaluate
from steploop.errors import ConfigError, StepOrderError

__all__ = ["update_ema"]


@shielded
def update_ema(state: TrainState, *, decay: float | Callable[[int], float]) -> TrainState:
    """Move the averaged weights towards the parameters; after ``optimizer_step``.

    With w the parameters, a the average and d the decay:   a <- d a + (1 - d) w

    Floating-point and complex values are averaged; of buffers that are integers the average has the newest. A step that
    was skipped does not move the average. Works in place: the state that went in is spent (after
    ``optimizer_step(state, donate=False)`` the tensors are copies already, so the state before it stays whole).

    Args:
        state: made with ``TrainState.create(..., ema=True)``; with ``ema_buffers=True`` buffers are averaged too.
        decay: d in [0, 1], typically 0.99 to 0.9999; 1 leaves the average alone. Or a function of the steps taken: for a
            warmup ``lambda step: min(0.999, (1 + step) / (10 + step))``; for every k-th step
            ``lambda step: 0.9 if step % k == 0 else 1.0``; for equal weights (SWA) from step s on
            ``lambda step: (step - s) / (step - s + 1) if step >= s else 0.0``.

    Raises:
        ConfigError: the state carries no average, or the decay is not in [0, 1].
        StepOrderError: there was no ``optimizer_step`` before.

    Source: Polyak and Juditsky 1992; the form is that of ``torch.optim.swa_utils.get_ema_multi_avg_fn``.

    Example:
        >>> state = TrainState.create(model, optimizer, ema=True)
        >>> state = update_ema(train_step(state, batch), decay=0.99)
    """
    state.check_alive("update_ema")
    averages = state.tensors.ema
    if averages is None:
        raise ConfigError(
            "update_ema: this state carries no average. Make it with TrainState.create(..., ema=True)."
        )
    finite: Any = state.finite
    if finite is None or state.flight.grads is not None:
        raise StepOrderError("update_ema: no optimizer step was taken before. Call it after optimizer_step.")
    d: Any = decay
    if callable(decay):
        trace = trace_of(state)
        d = decay(state.step) if trace is None else trace.value_at_step(state, decay)
    if not isinstance(d, Tensor) and not 0.0 <= d <= 1.0:
        raise ConfigError(f"update_ema: decay must lie in [0, 1], but is {d!r}.")
    if finite is False or (not isinstance(d, Tensor) and d == 1.0):
        return state
    values = {**params_to_evaluate(state), **state.tensors.buffers}
    state.lease.tear()
    with torch.no_grad():
        _move(averages, values, d, finite)
    return state.replace(generation=state.lease.hand_on("update_ema"))


def _move(averages: dict[str, Tensor], values: Mapping[str, Tensor], decay: Any, finite: Any) -> None:
    """A <- d a + (1 - d) w in place, where the step was finite; of integers the newest."""
    names = [name for name, a in averages.items() if a.is_floating_point() or a.is_complex()]
    weight: Any = 1.0 - decay
    if isinstance(finite, Tensor):
        # one tensor for each average: the host does not read it, as it would a single one
        whole = torch.as_tensor(weight, device=finite.device)
        chosen = torch.where(finite, whole, torch.zeros_like(whole))
        weight = [chosen.to(averages[n].dtype) for n in names]
    moved = [local_part(averages[n]) for n in names]
    torch._foreach_lerp_(moved, [local_part(values[n].detach()) for n in names], weight)
    for name, average in averages.items():
        if not (average.is_floating_point() or average.is_complex()):
            new = values[name].detach()
            average.copy_(new if finite is True else torch.where(finite, new, average))
