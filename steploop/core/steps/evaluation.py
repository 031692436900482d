"""``evaluate``: metrics of a state over batches, exact for any batch size, changing nothing."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from steploop.core.interruption import check_interruption
from steploop.core.state.surroundings import shielded
from steploop.core.state.train_state import TrainState
from steploop.core.steps.forward_pass import (
    Objective,
    SeededGenerators,
    read_objective,
    surroundings,
    translated,
)
from steploop.core.steps.trial import first_batches
from steploop.core.trees import count_samples, map_tensors
from steploop.errors import ConfigError, ObjectiveError

__all__ = ["Metric", "TorchMetric", "accuracy", "evaluate"]

# metric(outputs, batch) -> (sum over the batch, weight): their totals are divided at the end
Metric = Callable[[Any, Any], tuple[Any, Any]]


@runtime_checkable
class TorchMetric(Protocol):
    """What ``evaluate`` uses of a torchmetrics metric."""

    def update(self, *args: Any) -> None:
        """Take a batch in."""
        ...

    def compute(self) -> Any:
        """The value over all batches."""
        ...

    def reset(self) -> None:
        """Forget all batches."""
        ...


def accuracy(outputs: Any, batch: Any) -> tuple[Tensor, int]:
    """Share of samples whose largest logit is the label's.

    Args:
        outputs: ``logits`` (B, C), or a mapping that holds them under "logits".
        batch: ``(inputs, labels)`` with labels (B,) int64.
    """
    logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs
    labels = batch[1]
    return (logits.argmax(dim=-1) == labels).sum(), labels.numel()


@shielded
def evaluate(
    state: TrainState,
    batches: Iterable[Any],
    objective: Objective,
    metrics: Mapping[str, Metric | TorchMetric] | None = None,
    *,
    use_ema: bool = False,
) -> dict[str, float | None]:
    """Compute the mean loss and metrics of a state over ``batches``, in eval mode, without gradients.

    With (s_i, w_i) what a metric gives for batch i:  value = Σ s_i / Σ w_i, summed in float64 on the device. The
    loss's weight is the objective's, or the number of samples; so neither the batch size nor a short last batch
    matters. The host waits once, at the end.

    Changes nothing: parameters, buffers, ``.grad``, the generators, train and eval modes are as they were.

    Args:
        state: any living state.
        batches: what the objective takes; an iterable, read once.
        objective: as for ``forward_loss``.
        metrics: name -> ``(outputs, batch) -> (sum, weight)``, or a torchmetrics metric, which is updated with
            ``(outputs["logits"], batch[1])`` and reset before and after.
        use_ema: evaluate the averaged weights instead of the raw ones.

    Returns:
        "loss" and every metric as floats; None where there was no batch or all weights were 0.

    Raises:
        ConfigError: ``use_ema`` without an average, or a metric named "loss".
        ObjectiveError: an objective or a metric returned something else than it should.
    """
    state.check_alive("evaluate")
    metrics = metrics or {}
    if "loss" in metrics:
        raise ConfigError('evaluate: "loss" is the mean of the objective; give the metric another name.')
    if use_ema and state._ema is None:
        raise ConfigError(
            "evaluate: use_ema=True, but this state carries no average. Make it with TrainState.create(..., ema=True)."
        )
    totals = _Totals(state.device, metrics)
    with _EvalMode(state, use_ema=use_ema) as model:
        for index, batch in enumerate(first_batches(batches, averaged=use_ema)):
            check_interruption()
            loss, outputs, weight = _forward(state, model, index, batch, objective)
            with torch.no_grad():
                totals.add("loss", loss.double() * weight, weight)
                totals.add_metrics(outputs, batch)
    return totals.results()


def _forward(
    state: TrainState, model: nn.Module, index: int, batch: Any, objective: Objective
) -> tuple[Tensor, Any, Any]:
    """Loss, outputs and weight of a batch, without a graph; what is random depends on (seed, index) alone."""
    machine = state._machine
    try:
        with surroundings(machine, state.precision, grad=False), SeededGenerators(machine, state.seed, index):
            loss, outputs, weight = read_objective(objective(model, batch))
    except (RuntimeError, MemoryError) as error:
        if (ours := translated(error, machine, batch)) is None:
            raise
        raise ours from error
    weight = count_samples(batch) if weight is None else weight
    if weight is None:
        raise ObjectiveError(
            "evaluate: cannot count the samples of a batch without a tensor. Return (loss, outputs, weight) from the "
            "objective."
        )
    return loss, outputs, weight


class _Totals:
    """Running sums of values and weights, in float64 on the device (float32 where it has none)."""

    def __init__(self, device: torch.device, metrics: Mapping[str, Metric | TorchMetric]) -> None:
        self._device = device
        self._dtype = torch.float32 if device.type == "mps" else torch.float64
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}
        self._metrics = metrics
        self._torch_metrics: dict[str, TorchMetric] = {}
        for name, metric in metrics.items():
            if isinstance(metric, TorchMetric):
                self._torch_metrics[name] = metric
                metric.reset()

    def add(self, name: str, value: Any, weight: Any) -> None:
        """Count a batch in."""
        v = torch.as_tensor(value, device=self._device).to(self._dtype)
        w = torch.as_tensor(weight, device=self._device).to(self._dtype)
        # a batch without weight has a mean of 0 / 0: it counts for nothing, rather than making all of it nan
        v = torch.where(w == 0, torch.zeros_like(v), v)
        before = self._sums.get(name)
        self._sums[name] = (v, w) if before is None else (before[0] + v, before[1] + w)

    def add_metrics(self, outputs: Any, batch: Any) -> None:
        """Count a batch in for every metric."""
        for name, metric in self._metrics.items():
            if isinstance(metric, TorchMetric):
                metric.update(outputs["logits"], batch[1])
                continue
            result = metric(outputs, batch)
            if not isinstance(result, tuple) or len(result) != 2:
                raise ObjectiveError(
                    f"evaluate: the metric {name!r} must return (sum over the batch, weight), but returned "
                    f"{type(result).__name__}. For an accuracy: ((logits.argmax(1) == labels).sum(), len(labels))."
                )
            self.add(name, *result)

    def results(self) -> dict[str, float | None]:
        """Every value as a float, or None: the one time that the host waits."""
        values: dict[str, float | None] = {"loss": None, **dict.fromkeys(self._metrics)}
        for name, (total, weight) in self._sums.items():
            values[name] = float(total / weight) if float(weight) else None
        for name, metric in self._torch_metrics.items():
            values[name] = float(metric.compute()) if self._sums else None
            metric.reset()
        return values


class _EvalMode:
    """The module in eval mode over a state's values, with copies of its buffers; all put back on leaving."""

    def __init__(self, state: TrainState, *, use_ema: bool) -> None:
        self._module = state._machine.module
        self._params = state._ema if use_ema and state._ema is not None else state._params
        self._buffers = map_tensors(Tensor.clone, state._buffers)

    def __enter__(self) -> nn.Module:
        module = self._module
        self._before = (module.params(), module.buffers(), module.modes())
        module.place_params(self._params)
        module.place_buffers(self._buffers)
        module.set_training(training=False)
        return module.model

    def __exit__(self, *_: object) -> None:
        params, buffers, modes = self._before
        self._module.place_params(params)
        self._module.place_buffers(buffers)
        self._module.restore_modes(modes)
