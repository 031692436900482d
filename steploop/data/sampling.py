"""Order the samples of an epoch by weight or by length, as pure functions of (seed, epoch)."""

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from steploop.core.seeds import fold_in
from steploop.core.validators import require_int
from steploop.data.order import ORDER
from steploop.errors import ConfigError, DataError

__all__ = ["Order", "bucketed_order", "checked_order", "refuse_foreign_order", "weighted_order"]


class Order(Protocol):
    """A pure function of (seed, epoch) that says which samples an epoch visits, and when."""

    def __call__(self, *, seed: int, epoch: int) -> Tensor:
        """Give the indices of the samples, shape ``(M,)``, int64; M is the same for every epoch."""
        ...


def weighted_order(
    weights: Tensor | Sequence[float],
    *,
    seed: int,
    epoch: int,
    num_samples: int | None = None,
    replacement: bool = True,
) -> Tensor:
    """Draw an epoch's samples with probabilities proportional to weights.

    With replacement every draw is sample i with probability ``w[i] / sum(w)``. Without, the draws are made one after
    the other among the samples that are left: the largest ``log(u[i]) / w[i]`` with ``u`` uniform in 0..1.

    Args:
        weights: w, one for each sample, shape ``(N,)``, at least 0.
        seed: the run's seed.
        epoch: the epoch's number, from 0.
        num_samples: M, how many to draw; N unless given.
        replacement: whether a sample can be drawn again.

    Returns:
        Indices, shape ``(M,)``, int64.

    Raises:
        ConfigError: the weights are not legal, or too few are positive.

    Example:
        >>> from functools import partial
        >>> labels = torch.tensor([0, 0, 0, 1])
        >>> balanced = partial(weighted_order, 1 / torch.bincount(labels)[labels])
        >>> loader = Loader((torch.zeros(4, 2), labels), batch_size=2, seed=0, order=balanced)

    Source:
        Efraimidis and Spirakis, "Weighted random sampling with a reservoir" (2006), for draws without replacement.
    """
    w = _numbers("weights", weights)
    count = require_int("num_samples", len(w) if num_samples is None else num_samples, minimum=1)
    positive = int((w > 0).sum())
    if positive < (1 if replacement else count):
        raise ConfigError(
            f"{count} samples cannot be drawn {'' if replacement else 'without replacement '}from {len(w)} weights of "
            f"which {positive} are greater than 0"
        )
    generator = torch.Generator().manual_seed(fold_in(seed, ORDER, require_int("epoch", epoch, minimum=0)))
    if not replacement:
        keys = torch.rand(len(w), dtype=torch.float64, generator=generator).log() / w
        return keys.where(w > 0, -torch.inf).argsort(descending=True, stable=True)[:count]
    # torch.multinomial takes 2**24 weights at most
    edges = w.cumsum(0)
    draws = torch.rand(count, dtype=torch.float64, generator=generator) * edges[-1]
    # the product can round up to the last edge
    return torch.searchsorted(edges, draws, right=True).clamp_(max=int(w.nonzero().max()))


def bucketed_order(
    lengths: Tensor | Sequence[int], *, batch_size: int, seed: int, epoch: int, pool: int = 50
) -> Tensor:
    """Shuffle so that the samples of a batch are about equally long: less padding, the same samples.

    A random permutation is cut into pools of ``pool * batch_size`` samples, each pool is sorted by length and cut into
    batches, and all batches are shuffled. What is left over for an incomplete last batch is drawn before the sorting,
    so that no length is left out more often than another. A larger pool pads less and mixes less.

    Args:
        lengths: of each sample, shape ``(N,)``.
        batch_size: samples in a batch of all processes together: the Loader's ``batch_size * world_size``.
        seed: the run's seed.
        epoch: the epoch's number, from 0.
        pool: batches that are sorted together.

    Returns:
        A permutation of ``0 .. N - 1``, shape ``(N,)``, int64.

    Raises:
        ConfigError: an argument is not legal.

    Example:
        >>> from functools import partial
        >>> texts = ["a", "bb", "a long one", "another one"]
        >>> by_length = partial(bucketed_order, [len(text) for text in texts], batch_size=2)
        >>> loader = Loader(texts, batch_size=2, seed=0, order=by_length)
    """
    size = _numbers("lengths", lengths)
    batch_size, pool = require_int("batch_size", batch_size, minimum=1), require_int("pool", pool, minimum=1)
    generator = torch.Generator().manual_seed(fold_in(seed, ORDER, require_int("epoch", epoch, minimum=0)))
    shuffled = torch.randperm(len(size), generator=generator)
    batches = len(size) // batch_size
    whole, rest = shuffled[: batches * batch_size], shuffled[batches * batch_size :]
    by_length = size[whole].argsort(stable=True)
    by_pool = by_length[(by_length // (pool * batch_size)).argsort(stable=True)]
    mixed = whole[by_pool].view(batches, batch_size)[torch.randperm(batches, generator=generator)]
    return torch.cat([mixed.flatten(), rest])


_OURS: tuple[Any, ...] = (weighted_order, bucketed_order)


def refuse_foreign_order(order: Order, *, num_samples: int, batch_size: int) -> None:
    """Refuse weights or lengths of other data, which would leave samples out, and buckets of another size.

    Args:
        order: any; looked at if it is a ``functools.partial`` of an order of this module.
        num_samples: of the dataset.
        batch_size: samples in a batch of all processes together.

    Raises:
        ConfigError: there are more or fewer weights or lengths than samples, or the buckets are no whole batches.
    """
    if not isinstance(order, partial) or order.func not in _OURS:
        return
    given = inspect.signature(order.func).bind_partial(*order.args, **order.keywords).arguments
    for name in ("weights", "lengths"):
        if name in given and (count := len(_numbers(name, given[name]))) != num_samples:
            raise ConfigError(
                f"order: {order.func.__name__} has {count} {name}, but the dataset has {num_samples} samples. Give one for "
                "each of them, in their order"
            )
    size = given.get("batch_size", batch_size)
    if type(size) is int and size % batch_size:  # buckets of two batches keep the lengths together too
        raise ConfigError(
            f"order: bucketed_order has batch_size={size!r}, but a batch of all processes has {batch_size} samples, so that "
            f"batches would mix lengths. Give it batch_size={batch_size}"
        )


def checked_order(order: Order, *, seed: int, epoch: int, num_samples: int, length: int | None) -> Tensor:
    """Call a user's order, and look at what it gives.

    Raises:
        ConfigError: it cannot be called so.
        DataError: it gives no indices of samples, or another number of them than for epoch 0.
    """
    try:
        rows = torch.as_tensor(order(seed=seed, epoch=epoch))
    except TypeError as error:
        raise ConfigError(
            f"order is called as order(seed=..., epoch=...) and must give indices: {error}. Fix its other arguments with "
            "functools.partial, as in partial(weighted_order, weights)"
        ) from error
    if rows.dim() != 1 or rows.dtype != torch.int64 or rows.device.type != "cpu":
        raise DataError(
            f"order must give indices of shape (M,), int64, on the CPU; for epoch {epoch} it gave shape "
            f"{tuple(rows.shape)}, {rows.dtype}, on {rows.device}"
        )
    if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < num_samples:
        raise DataError(
            f"order must give indices in 0..{num_samples - 1}, and for epoch {epoch} gave some in "
            f"{int(rows.min())}..{int(rows.max())}"
        )
    if length is not None and len(rows) != length:
        raise DataError(
            f"order must give as many indices for every epoch: {length} for epoch 0, but {len(rows)} for epoch {epoch}"
        )
    return rows


def _numbers(name: str, values: Any) -> Tensor:
    try:
        found = torch.as_tensor(values, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{name} must be numbers, one for each sample: {error}") from error
    if found.dim() != 1 or not bool(torch.isfinite(found).all()) or (len(found) and bool((found < 0).any())):
        raise ConfigError(
            f"{name} must be finite numbers of at least 0, one for each sample: shape (N,), got {tuple(found.shape)}"
        )
    return found
