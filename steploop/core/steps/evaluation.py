"""``evaluate``: metrics of a state over batches, exact for any batch size, changing nothing."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from steploop.core.interruption import check_interruption
from steploop.core.state.copying import lazy_clone, leaf_like
from steploop.core.state.surroundings import shielded_sums
from steploop.core.state.trace import trace_of
from steploop.core.state.train_state import TrainState
from steploop.core.steps.by_parts.sharded_steps import in_rounds
from steploop.core.steps.forward_pass import seeded_generators, surroundings
from steploop.core.steps.judged_params import params_to_evaluate
from steploop.core.steps.metric_totals import MetricTotals
from steploop.core.steps.metrics import Metric, TorchMetric, accuracy
from steploop.core.steps.objectives import Objective, read_objective
from steploop.core.steps.pass_failures import translated
from steploop.core.steps.trial import first_batches
from steploop.core.trees import UNCOUNTED, count_samples, map_tensors
from steploop.errors import CompileError, ConfigError, ObjectiveError

# the first three are those of ``metrics``: 0.1.0 had them here
__all__ = ["Metric", "TorchMetric", "accuracy", "evaluate"]


@shielded_sums
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

    Where the state has ranks, every rank gives all ``batches``, the same ones in the same order, and computes every
    size-th of them, beginning with its own number; one that it does not compute may be None. What each batch gave is
    gathered and summed in the order of the batches: any number of ranks gives the same bits, on every rank. A
    torchmetrics metric gathers its own state, in an order of its own: the last bits of its sums may depend on the number
    of ranks. A batch that comes in parts, as a train step gets it, is computed by those who have them.

    Changes nothing: parameters, buffers, ``.grad``, the generators, train and eval modes are as they were.

    Args:
        state: any living state.
        batches: what the objective takes; an iterable, read once.
        objective: as for ``forward_loss``.
        metrics: name -> ``(outputs, batch) -> (sum, weight)``, or a torchmetrics metric or collection, which is updated
            with logits and labels as ``accuracy`` finds them, and reset before and after. A sum may be a tensor of one
            axis, one entry for each class, with weights of that shape.
        use_ema: evaluate the averaged weights instead of the raw ones.

    Returns:
        "loss" and every metric as floats; None where there was no batch or all weights were 0. A metric with an entry for
        each class is there as "name.0", "name.1", ..., a collection as "name.key".

    Raises:
        ConfigError: ``use_ema`` without an average, or a metric named "loss".
        ObjectiveError: an objective or a metric returned something else than it should, or the samples of a batch cannot
            be counted.

    Example:
        >>> state = TrainState.create(torch.nn.Linear(2, 1), steploop.Optimizer(torch.optim.SGD, lr=0.1))
        >>> evaluate(state, [torch.zeros(4, 2)], lambda model, x: (model(x) * 0).sum())
        {'loss': 0.0}
    """
    state.check_alive("evaluate")
    state.machine.check_groups()
    if trace_of(state) is not None:
        raise CompileError(
            "calls evaluate, which gives numbers of Python, in the midst of a step. Evaluate between two steps, or compute the loss "
            "with forward_loss(state, batch, objective).loss, which is a tensor."
        )
    metrics = metrics or {}
    if "loss" in metrics:
        raise ConfigError('evaluate: "loss" is the mean of the objective; give the metric another name.')
    if use_ema and state.tensors.ema is None:
        raise ConfigError(
            "evaluate: use_ema=True, but this state carries no average. Make it with TrainState.create(..., ema=True)."
        )
    totals = MetricTotals(state, metrics)
    passes = _Passes(state, objective)
    with _EvalMode(state, use_ema=use_ema) as model:
        given = first_batches(batches, averaged=use_ema)
        sharded = state.machine.module.sharded is not None
        for index, batch in in_rounds(state, given) if sharded else enumerate(given):
            check_interruption(together=index is not None)
            if index is None:  # a pass that the other ranks need this one for
                passes.run(model, 0, batch)
                continue
            for number, mine in totals.mine(index, batch):
                loss, outputs, weight = passes.run(model, number, mine)
                with torch.no_grad():
                    totals.add("loss", loss.double() * weight, weight)
                    totals.add_metrics(outputs, mine)
    return totals.results()


class _Passes:
    """Passes without a graph; an objective that differentiates inside gets one."""

    def __init__(self, state: TrainState, objective: Objective) -> None:
        self._state = state
        self._objective = objective
        self._grad = False

    def run(self, model: nn.Module, index: int, batch: Any) -> tuple[Tensor, Any, Any]:
        """Loss, outputs and weight of a batch; what is random depends on (seed, index) alone."""
        try:
            loss, outputs, weight = self._pass(model, index, batch)
        except RuntimeError as error:
            # a gradient penalty, forces as the gradient of an energy: torch.autograd.grad within the objective
            if self._grad or "does not require grad" not in str(error):
                raise
            self._grad = True
            loss, outputs, weight = self._pass(model, index, batch)
        weight = count_samples(batch) if weight is None else weight
        if weight is None:
            raise ObjectiveError(f"evaluate: {UNCOUNTED}")
        if not (
            isinstance(weight, Tensor) and weight.device.type != "cpu"
        ):  # on a device it waits for the results
            value = float(weight)
            if not 0 <= value < math.inf:
                raise ObjectiveError(
                    f"evaluate: a weight must be a finite number >= 0, but the objective gave {value!r}."
                )
        return loss, outputs, weight

    def _pass(self, model: nn.Module, index: int, batch: Any) -> tuple[Tensor, Any, Any]:
        state, machine = self._state, self._state.machine
        try:
            with (
                surroundings(machine, state.precision, grad=self._grad),
                seeded_generators(machine, state.seed, index),
            ):
                loss, outputs, weight = read_objective(self._objective(model, batch))
        except (RuntimeError, MemoryError) as error:
            if (ours := translated(error, machine, batch)) is None:
                raise
            raise ours from error
        return (
            (loss.detach(), map_tensors(Tensor.detach, outputs), weight)
            if self._grad
            else (loss, outputs, weight)
        )


class _EvalMode:
    """The module in eval mode over a state's values, with copies of its buffers; all put back on leaving."""

    def __init__(self, state: TrainState, *, use_ema: bool) -> None:
        tensors = state.tensors
        self._module = state.machine.module
        self._params: Mapping[str, Tensor] = params_to_evaluate(state)
        self._buffers = {name: b.clone() for name, b in tensors.buffers.items()}
        self._extra = tensors.extra
        if use_ema and tensors.ema is not None:
            averages = tensors.ema
            self._params = {name: averages[name] for name in tensors.params}
            self._buffers |= {name: averages[name].clone() for name in tensors.buffers if name in averages}
        # the model may move some in this pass too; of those that are trained it is known after the first training pass
        machine = state.machine
        frozen = () if self._module.sharded is not None else machine.not_trained
        names = self._params if machine.moved is None else {*machine.moved, *frozen}
        copies = {name: leaf_like(self._params[name], lazy_clone(self._params[name])) for name in names}
        if copies:
            self._params = {**self._params, **copies}

    def __enter__(self) -> nn.Module:
        module = self._module
        module.check()
        module.check_buffers()
        self._put_back = module.keep()
        module.place_params(self._params)
        module.place_buffers(self._buffers)
        module.set_extra_state(self._extra)
        module.set_training(training=False)
        return module.model

    def __exit__(self, *_: object) -> None:
        self._put_back()
