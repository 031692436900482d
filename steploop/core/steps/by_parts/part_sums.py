"""Sums over the parts of a batch by one fixed binary tree, in one process or over many: the same bits."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from steploop.core.ranks import Ranks
from steploop.core.steps.by_parts.part_exchange import Bucket, Exchange, bucketed
from steploop.core.steps.by_parts.part_tree import Node, join
from steploop.errors import ConfigError

__all__ = ["PartSum"]

_Values = list[Tensor | None]


def _added(left: _Values, right: _Values) -> _Values:
    """The sum of two lists in the memory of one of them; None counts as zeros, which turn -0.0 into 0.0."""
    both = [(a, b) for a, b in zip(left, right, strict=True) if a is not None and b is not None]
    if both:
        torch._foreach_add_([a for a, _ in both], [b for _, b in both])
    for a, b in zip(left, right, strict=True):
        if (alone := a if b is None else b) is not None and (a is None or b is None):
            alone.add_(0)
    return [b if a is None else a for a, b in zip(left, right, strict=True)]


class PartSum:
    """A sum over the parts of lists of tensors, which it takes over: this process's, in the order of their numbers.

    Where a tensor is None on some parts it counts as zeros there; where it is None on all, the sum is None.

    Args:
        ranks: who has the other parts.
        like: one tensor for each place of the lists: of its shape, dtype and layout.
        plans: where the buckets for such lists are kept.
        key: which of the plans is for these.
    """

    def __init__(self, ranks: Ranks, like: Sequence[Tensor], plans: dict[Any, Any], key: Any = None) -> None:
        self._ranks = ranks
        self._like = like
        self._nodes: list[tuple[Node, _Values]] = []
        self._running: list[tuple[Bucket, Exchange]] = []
        self._buckets: list[Bucket] = []
        self._sent: list[
            tuple[int, Tensor, int]
        ] = []  # during a backward pass: place, gradient and its version
        if ranks.size > 1:
            key = (ranks.size, key)
            if key not in plans:
                plans[key] = bucketed(like, ranks.size)
            self._buckets = plans[key]

    def add(self, number: int, values: _Values) -> None:
        """Count the values of part ``number`` in."""
        if any(v is not None and v.layout is not torch.strided for v in values):
            raise ConfigError(
                "A step with ranks sums the gradients of parts, and cannot sum sparse ones (nn.Embedding(sparse=True)). Use a "
                "dense embedding."
            )
        for place, grad, version in self._sent:
            if values[place] is not grad or grad._version != version:
                raise ConfigError(
                    "A gradient changed after it was sent to the other ranks: a parameter is used in two parts of the model that are "
                    "recomputed one after the other. Use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
                )
        self._nodes.append(((number, number + 1), values))
        if self._ranks.size == 1 or number != self._ranks.mine[-1]:  # the last one is added bucket by bucket
            join(self._nodes, self._ranks.parts, _added)

    @contextmanager
    def sending(self, number: int, leaves: Sequence[Tensor]) -> Iterator[None]:
        """Send the gradients of part ``number``, if it is the last one, during its backward pass: as soon as they are there."""
        if self._ranks.size == 1 or number != self._ranks.mine[-1]:
            yield
            return

        def send(_: Tensor) -> None:
            while len(self._running) < len(self._buckets):
                bucket = self._buckets[len(self._running)]
                grads = [leaves[place].grad for place in bucket.places]
                if any(grad is None for grad in grads):  # not yet, or never: then it is sent in the end
                    return
                self._start(bucket, [*self._nodes_of(bucket), ((number, number + 1), grads)])
                pairs = zip(bucket.places, grads, strict=True)
                self._sent += [(place, g, g._version) for place, g in pairs if g is not None]

        # the first parameter of a bucket is nearly always the last one to have its gradient
        hooks: list[Any] = [
            leaves[bucket.places[-1]].register_post_accumulate_grad_hook(send)  # type: ignore[no-untyped-call]
            for bucket in self._buckets
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _nodes_of(self, bucket: Bucket) -> list[tuple[Node, _Values]]:
        return [(node, [values[place] for place in bucket.places]) for node, values in self._nodes]

    def _start(self, bucket: Bucket, nodes: list[tuple[Node, _Values]]) -> None:
        """Begin to sum a bucket: all ranks do so in one order."""
        join(nodes, self._ranks.parts, _added)
        exchange = Exchange(self._ranks, bucket, [self._like[place] for place in bucket.places], nodes)
        if self._running:
            self._running[-1][1].go_on()
        self._running.append((bucket, exchange))

    def result(self) -> _Values:
        """The sum over all parts of all processes."""
        if self._ranks.size == 1:
            return self._nodes[0][1]
        for bucket in self._buckets[len(self._running) :]:
            self._start(bucket, self._nodes_of(bucket))
        if self._running:
            self._running[-1][1].go_on()
        sums: _Values = [None] * len(self._like)
        for bucket, exchange in self._running:
            for place, value in zip(bucket.places, exchange.finish(), strict=True):
                sums[place] = value
        return sums
