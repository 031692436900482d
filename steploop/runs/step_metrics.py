"""Read the numbers of a step for the log; nothing else in a run waits for the device."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from steploop.core.batch_parts import Parts
from steploop.core.state.several import State, members
from steploop.core.state.train_state import TrainState
from steploop.core.steps.metrics import Metric
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
        metrics: name -> ``(outputs, batch) -> (sum, weight)``, of each state's outputs. Of ranks each is called for each part of
            the batch, and every rank calls this; sums and weights are added in the order of the parts.

    Raises:
        NonFiniteError: too many steps in a row were not finite.
    """
    values: dict[str, Any] = {}
    for name, one in members(state).items():
        prefix = f"{name}." if name else ""
        values |= {prefix + key: value for key, value in _read(one).items()}
        for label, (total, weight) in _measured(one, batch, metrics).items():
            values[prefix + label] = total / weight if weight else None
    return values


def _measured(
    state: TrainState, batch: Any, metrics: Mapping[str, Metric]
) -> Mapping[str, tuple[float, float]]:
    """The sum and the weight of each metric; of none where the objective gives no outputs."""
    if not metrics:
        return {}
    if state.ranks is None:
        return {} if state.outputs is None else _called(metrics, state.outputs, batch)
    mine = [
        _called(metrics, outputs, part)
        for place in range(len(state.ranks.mine))
        # a part that has no samples has no outputs
        if (part := _part(batch, place)) is not None and (outputs := _part(state.outputs, place)) is not None
    ]
    parts = [part for some in state.ranks.gather_objects(mine) for part in some]
    if not parts:
        return {}
    return {
        label: (sum(part[label][0] for part in parts), sum(part[label][1] for part in parts))
        for label in metrics
    }


def _called(metrics: Mapping[str, Metric], outputs: Any, batch: Any) -> dict[str, tuple[float, float]]:
    found = {label: metric(outputs, batch) for label, metric in metrics.items()}
    return {label: (float(total), float(weight)) for label, (total, weight) in found.items()}


def _part(tree: Any, place: int) -> Any:
    """One part of what a batch became; outputs of micro-batches are a list of parts."""
    if type(tree) is Parts:
        return tree.batches[place]
    if type(tree) is list:
        items = [_part(item, place) for item in tree]
        return None if all(item is None for item in items) else items
    return tree
