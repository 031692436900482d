"""Metrics of a batch: the forms that ``evaluate`` takes, and accuracy."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from steploop.errors import ObjectiveError

__all__ = ["Metric", "TorchMetric", "accuracy", "logits_and_labels"]

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
    scores, targets = logits_and_labels(outputs, batch, logits, labels)
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


def logits_and_labels(
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
