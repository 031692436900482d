"""``evaluate``: metrics of a state over batches, exact for any batch size, changing nothing."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from steploop.core.interruption import check_interruption
from steploop.core.ranks import Parts, Ranks
from steploop.core.state.copying import lazy_clone, leaf_like
from steploop.core.state.surroundings import shielded_sums
from steploop.core.state.trace import trace_of
from steploop.core.state.train_state import TrainState
from steploop.core.steps.forward_pass import (
    Objective,
    read_objective,
    seeded_generators,
    surroundings,
    translated,
)
from steploop.core.steps.judged_params import params_to_evaluate
from steploop.core.steps.metric_ranks import given_all, refuse_unsynchronised
from steploop.core.steps.part_passes import is_empty, joined_parts, parts_of
from steploop.core.steps.sharded_steps import in_rounds
from steploop.core.steps.trial import first_batches
from steploop.core.trees import UNCOUNTED, count_samples, map_tensors
from steploop.errors import CompileError, ConfigError, ObjectiveError

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


def accuracy(
    outputs: Any, batch: Any, *, logits: str = "logits", labels: str | int | None = None
) -> tuple[Tensor, int]:
    """The share of samples whose largest logit is the label's, as (sum, weight).

    Args:
        outputs: logits (B, C), or (B, ..., C), or a mapping that holds them.
        batch: ``(inputs, labels)`` with integer labels (B,), or (B, ...); or a mapping that holds them.
        logits: the key of the logits in a mapping of outputs.
        labels: the key or index of the labels in the batch: "labels" in a mapping and 1 elsewhere, if it is None. Give
            it with ``functools.partial(accuracy, labels="y")``.

    Raises:
        ObjectiveError: the labels' shape is not that of the logits without their last axis, there is one class only, or a
            key is missing.

    Example:
        >>> accuracy(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), (None, torch.tensor([1, 1])))
        (tensor(1), 2)
    """
    scores, targets = _logits_and_labels(outputs, batch, logits, labels)
    if (
        scores.dim() == 0
        or scores.shape[:-1] != targets.shape
        or scores.shape[-1] < 2
        or targets.is_floating_point()
    ):
        raise ObjectiveError(
            f"accuracy: expected integer labels of shape (B,) and logits of shape (B, C) with C >= 2, but the labels are "
            f"{tuple(targets.shape)} {targets.dtype} and the logits {tuple(scores.shape)}. Reshape them; for one logit a sample "
            "write a metric of your own, as ((logits > 0) == labels).sum()."
        )
    return (scores.argmax(dim=-1) == targets).sum(), targets.numel()


def _logits_and_labels(
    outputs: Any, batch: Any, logits: str, labels: str | int | None
) -> tuple[Tensor, Tensor]:
    """The logits of what an objective gave, and the labels of its batch."""
    where: Any = labels if labels is not None else "labels" if isinstance(batch, Mapping) else 1
    found = []
    for what, tree, key in (("outputs", outputs, logits), ("batch", batch, where)):
        value = tree
        if what == "batch" or isinstance(tree, Mapping):
            try:
                value = tree[key]
            except (KeyError, IndexError, TypeError):
                known = f"It has: {', '.join(map(str, tree))}." if isinstance(tree, Mapping) else ""
                raise ObjectiveError(
                    f"The {what} have no {key!r}. {known} Name the keys: functools.partial(accuracy, logits=..., labels=...)."
                ) from None
        if not isinstance(value, Tensor):
            raise ObjectiveError(
                f"{key!r} of the {what} is a {type(value).__name__}, but a tensor is needed."
            )
        found.append(value)
    return found[0], found[1]


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
    totals = _Totals(state, metrics)
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


class _Totals:
    """Running sums of values and weights, in float64 on the device (float32 where it has none)."""

    def __init__(self, state: TrainState, metrics: Mapping[str, Metric | TorchMetric]) -> None:
        self._state = state
        self._device = state.device
        self._ranks = None if state.ranks is None or state.ranks.size == 1 else state.ranks
        self._place = 0, 0  # number of the batch, and of the part where it comes in parts
        self._whole = 0  # batches that came whole
        self._first: dict[str, Any] = {}  # what torchmetrics got of the first, for ranks that get none
        self._told: list[tuple[tuple[int, int], str, Tensor, Tensor]] = []  # for the other ranks
        self._dtype = torch.float32 if self._device.type == "mps" else torch.float64
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}
        self._good: dict[str, Any] = {}  # whether every weight was one; read at the end
        self._metrics = metrics
        self._torch_metrics: dict[str, TorchMetric] = {}
        for name, metric in metrics.items():
            if isinstance(metric, TorchMetric):
                if self._ranks is not None:
                    refuse_unsynchronised(name, metric)
                self._torch_metrics[name] = metric
                metric.reset()

    def mine(self, index: int, batch: Any) -> Iterator[tuple[int, Any]]:
        """What this process computes of a batch, each with a number of its own among all."""
        parts = batch if type(batch) is Parts or self._state.ranks is None else joined_parts(batch)
        if type(parts) is Parts:
            if self._state.machine.module.sharded is not None:
                raise ConfigError(
                    "evaluate: a sharded model takes whole batches here, on every rank, and not the parts of one."
                )
            parts = parts_of(self._state, parts, "evaluate")
            for number, part in zip(parts.numbers, parts.batches, strict=True):
                self._place = index, number
                if not is_empty(part):
                    yield index * parts.total + number, part
        elif self._ranks is None or index % self._ranks.size == self._ranks.rank:
            self._place = index, 0
            yield index, batch
        self._whole += type(parts) is not Parts

    def add(self, name: str, value: Any, weight: Any) -> None:
        """Count a batch in."""
        v = torch.as_tensor(value, device=self._device).to(self._dtype)
        w = torch.as_tensor(weight, device=self._device).to(self._dtype)
        before = self._sums.get(name)
        if v.dim() > 1 or w.shape not in {v.shape, torch.Size()} or (before and before[0].shape != v.shape):
            raise ObjectiveError(
                f"evaluate: the metric {name!r} gave a sum of shape {tuple(v.shape)} with a weight of shape {tuple(w.shape)}"
                f"{f' after sums of shape {tuple(before[0].shape)}' if before else ''}. Give two numbers, or two tensors with an "
                "entry for each class."
            )
        if self._ranks is not None:
            self._told.append((self._place, name, v, w))
            return
        self._good[name] = self._good.get(name, True) & ((w >= 0) & (w < math.inf)).all()
        # a batch without weight has a mean of 0 / 0: it counts for nothing, rather than making all of it nan
        v = torch.where(w == 0, torch.zeros_like(v), v)
        self._sums[name] = (v, w) if before is None else (before[0] + v, before[1] + w)

    def add_metrics(self, outputs: Any, batch: Any) -> None:
        """Count a batch in for every metric."""
        for name, metric in self._metrics.items():
            if isinstance(metric, TorchMetric):
                pair = _logits_and_labels(outputs, batch, "logits", None)
                metric.update(*pair)
                if self._ranks is not None and self._whole < self._ranks.size:
                    self._first[name] = pair
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
        alone: AbstractContextManager[object] = nullcontext()
        if self._ranks is not None:
            if 0 < self._whole < self._ranks.size:
                alone = given_all(self._torch_metrics, self._first, self._ranks, self._device)
            self._hear(self._ranks)
        values: dict[str, float | None] = {"loss": None, **dict.fromkeys(self._metrics)}
        for name, (total, weight) in self._sums.items():
            if not bool(self._good[name]):
                of = "the objective" if name == "loss" else f"the metric {name!r}"
                raise ObjectiveError(
                    f"evaluate: {of} gave a weight that is no finite number >= 0 for some batch."
                )
            if total.dim() == 0:
                values[name] = float(total / weight) if float(weight) else None
                continue
            del values[name]
            pairs = zip(total.tolist(), weight.expand_as(total).tolist(), strict=True)
            values |= {f"{name}.{i}": t / w if w else None for i, (t, w) in enumerate(pairs)}
        with alone:
            for name, metric in self._torch_metrics.items():
                del values[name]
                values |= _flat(name, metric.compute()) if self._sums else {name: None}
                metric.reset()
        return values

    def _hear(self, ranks: Ranks) -> None:
        """Add what every process counted, in the order of the batches."""
        told = [(place, name, v.cpu(), w.cpu()) for place, name, v, w in self._told]
        self._ranks, heard = None, ranks.gather_objects(told)
        for _, name, v, w in sorted((one for some in heard for one in some), key=lambda one: one[0]):
            self.add(name, v, w)


def _flat(name: str, value: Any) -> dict[str, float | None]:
    """What a torchmetrics metric computed as numbers: a collection and a tensor with an axis have several."""
    if isinstance(value, Mapping):
        return {key: number for k, v in value.items() for key, number in _flat(f"{name}.{k}", v).items()}
    if isinstance(value, Tensor) and value.dim():
        return {f"{name}.{i}": float(v) for i, v in enumerate(value.flatten().tolist())}
    return {name: float(value)}


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
