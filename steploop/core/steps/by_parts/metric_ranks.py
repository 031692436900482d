"""Metrics of torchmetrics where several ranks evaluate: who gathers, and what a rank without a batch does."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from steploop.core.ranks import Ranks
from steploop.core.trees import map_tensors, to_device
from steploop.errors import ConfigError

__all__ = ["given_all", "refuse_unsynchronised"]

_ASKS = "distributed_available_fn"  # torchmetrics asks it whether there is anybody to gather from


def refuse_unsynchronised(name: str, metric: Any) -> None:
    """Refuse a metric that would know this rank's batches only.

    Raises:
        ConfigError: it has ``update`` and ``compute``, but is not of torchmetrics.
    """
    if any(kind.__module__.partition(".")[0] == "torchmetrics" for kind in type(metric).__mro__):
        return
    raise ConfigError(
        f"evaluate: the metric {name!r} is a {type(metric).__name__}, which sees the batches of its own rank only. Give a function "
        "(outputs, batch) -> (sum, weight), or a metric of torchmetrics, which gathers over ranks."
    )


@contextmanager
def given_all(
    metrics: Mapping[str, Any], own: Mapping[str, Any], ranks: Ranks, device: torch.device
) -> Iterator[None]:
    """Give every rank all batches, of which there are fewer than ranks; inside, metrics gather nothing.

    A metric that has seen no batch cannot gather its state: it knows neither how many axes the others have nor their types.

    Args:
        metrics: name -> metric, on every rank.
        own: name -> what it was given of this rank's batch; empty where this rank has none.
        ranks: in the order of the batches.
        device: of this rank.
    """
    told = ranks.gather_objects(map_tensors(Tensor.cpu, dict(own)))
    gathering: dict[nn.Module, Any] = {}
    for name, metric in metrics.items():
        gathering |= {part: getattr(part, _ASKS) for part in metric.modules() if hasattr(part, _ASKS)}
        metric.reset()
        for one in told:
            if name in one:
                metric.update(*to_device(one[name], device))
    for part in gathering:
        setattr(part, _ASKS, lambda: False)
    try:
        yield
    finally:
        for part, asks in gathering.items():
            setattr(part, _ASKS, asks)
