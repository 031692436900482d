"""Sums of metrics and weights over batches, and over the ranks that share them."""

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from steploop.core.batch_parts import Parts
from steploop.core.ranks import Ranks
from steploop.core.state.train_state import TrainState
from steploop.core.steps.by_parts.metric_ranks import given_all, refuse_unsynchronised
from steploop.core.steps.by_parts.part_passes import is_empty, joined_parts, parts_of
from steploop.core.steps.metrics import Metric, TorchMetric, logits_and_labels
from steploop.errors import ConfigError, ObjectiveError

__all__ = ["MetricTotals"]


class MetricTotals:
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
                pair = logits_and_labels(outputs, batch, "logits", None)
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
