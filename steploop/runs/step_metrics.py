"""Read the numbers of a step for the log; nothing else in a run waits for the device."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from steploop.core.state.several import State, members
from steploop.core.state.train_state import TrainState
from steploop.core.steps.evaluation import Metric
from steploop.core.steps.update import check_nonfinite

__all__ = ["MAX_NONFINITE_STEPS", "read_step"]

MAX_NONFINITE_STEPS = 100  # optimizer_step's default; on a device, this is where the count is read


def _number(value: float | Tensor | None) -> float | None:
    return None if value is None else float(value)


def _read(state: TrainState) -> dict[str, float | int | None]:
    settled = state.settle()
    check_nonfinite(settled, MAX_NONFINITE_STEPS, "it is on the device and was given away already")
    values = {
        "loss": _number(settled.loss),
        "learning_rate": settled.learning_rate,
        "grad_norm": _number(settled.grad_norm),
        "clipped_norm": _number(settled.clipped_norm),
        "skipped": settled.attempted_steps - settled.step,
    }
    return values if settled.scale is None else values | {"loss_scale": float(settled.scale.scale)}


def read_step(state: State, batch: Any, metrics: Mapping[str, Metric]) -> dict[str, Any]:
    """The numbers of the step that gave ``state``; waits for the device.

    Args:
        state: after a train step. The numbers of several states are prefixed with their names.
        batch: what the step was taken on.
        metrics: name -> ``(outputs, batch) -> (sum, weight)``, of the lead state's outputs.

    Raises:
        NonFiniteError: too many steps in a row were not finite.
    """
    values: dict[str, Any] = {}
    for name, one in members(state).items():
        prefix = f"{name}." if name else ""
        values |= {prefix + key: value for key, value in _read(one).items()}
        for label, metric in metrics.items() if one.outputs is not None else ():
            total, weight = metric(one.outputs, batch)
            values[prefix + label] = float(total) / float(weight) if float(weight) else None
    return values
