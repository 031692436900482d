"""EMA: the exponential moving average of the weights, as one more step function."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from steploop.core.state.surroundings import shielded
from steploop.core.state.trace import trace_of
from steploop.core.state.train_state import TrainState
from steploop.errors import ConfigError, StepOrderError

__all__ = ["update_ema"]


@shielded
def update_ema(state: TrainState, *, decay: float | Callable[[int], float]) -> TrainState:
    """Move the averaged weights towards the parameters; after ``optimizer_step``.

    With w the parameters, a the average and d the decay:   a <- d a + (1 - d) w

    A step that was skipped does not move the average. Works in place: the state that went in is spent (after
    ``optimizer_step(state, donate=False)`` the tensors are copies already, so the state before it stays whole).

    Args:
        state: made with ``TrainState.create(..., ema=True)``.
        decay: d in [0, 1), typically 0.99 to 0.9999; or a function of the steps taken, for a warmup such as
            ``lambda step: min(0.999, (1 + step) / (10 + step))``.

    Raises:
        ConfigError: the state carries no average, or the decay is not in [0, 1).
        StepOrderError: there was no ``optimizer_step`` before.

    Source: Polyak and Juditsky 1992; the form is that of ``torch.optim.swa_utils.get_ema_multi_avg_fn``.
    """
    state.check_alive("update_ema")
    averages = state._ema
    if averages is None:
        raise ConfigError(
            "update_ema: this state carries no average. Make it with TrainState.create(..., ema=True)."
        )
    finite: Any = state.finite
    if finite is None or state._grads is not None:
        raise StepOrderError("update_ema: no optimizer step was taken before. Call it after optimizer_step.")
    d: Any = decay
    if callable(decay):
        trace = trace_of(state)
        d = decay(state.step) if trace is None else trace.value_at_step(state, decay)
    if not 0.0 <= d < 1.0:
        raise ConfigError(f"update_ema: decay must lie in [0, 1), but is {d!r}.")
    if finite is False:
        return state
    with torch.no_grad():
        names = [name for name, average in averages.items() if average.is_floating_point()]
        weight: Any = 1.0 - d
        if isinstance(finite, Tensor):
            # one tensor for each average: the host does not read it, as it would a single one
            whole = torch.as_tensor(weight, device=finite.device)
            chosen = torch.where(finite, whole, torch.zeros_like(whole))
            weight = [chosen.to(averages[n].dtype) for n in names]
        torch._foreach_lerp_([averages[n] for n in names], [state._params[n].detach() for n in names], weight)
    return state.donate("update_ema")
