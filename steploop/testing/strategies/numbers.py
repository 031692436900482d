"""Generate gradient trees, loss scales, partitions and cut points."""

import math
from collections.abc import Mapping

import torch
from hypothesis import strategies as st
from torch import Tensor

from steploop.core.precision import LossScale

__all__ = ["bounds", "cuts", "gradient_trees", "loss_scales", "partitions", "powers_of_two", "shapes"]

_TINY = [1e-45, 1.2e-38, 1e-30, 1e-20, 1e-9]  # the first is float32's smallest subnormal
_HUGE = [1e9, 1e18, 1.8e19, 1e30, 3.4e38]  # 1.8e19 squares to just below float32's largest number
_NOT_FINITE = [math.inf, -math.inf, math.nan]


def shapes() -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes of parameters: scalars, vectors, matrices and filters."""
    return st.lists(st.integers(1, 4), max_size=4).map(tuple)


def _entries(*, huge: bool, nonfinite: bool) -> st.SearchStrategy[float]:
    special = [0.0, -0.0, *_TINY, *(-x for x in _TINY)]
    if huge:
        special += [*_HUGE, *(-x for x in _HUGE)]
    usual = st.floats(-100.0, 100.0, width=32) | st.sampled_from(special)
    return usual | st.sampled_from(_NOT_FINITE) if nonfinite else usual


@st.composite
def gradient_trees(
    draw: st.DrawFn,
    like: Mapping[str, Tensor] | None = None,
    *,
    huge: bool = True,
    nonfinite: bool = True,
) -> dict[str, Tensor]:
    """Name -> float32 gradient: zero, tiny, usual, huge and not finite entries, in any mixture.

    Args:
        draw: given by Hypothesis.
        like: parameters whose names and shapes to take; any shapes without it.
        huge: whether entries may be so large that the norm overflows float32.
        nonfinite: whether entries may be inf or nan.
    """
    if like is None:
        like = {
            f"p{i}": torch.empty(shape)
            for i, shape in enumerate(draw(st.lists(shapes(), min_size=1, max_size=4)))
        }
    entries = _entries(huge=huge, nonfinite=nonfinite)
    tree = {}
    for name, p in like.items():
        size = p.numel()
        # a few entries in turn, rather than one drawn for each: as many kinds, and a tenth of the time
        pattern = draw(st.lists(entries, min_size=1, max_size=min(size, 4) or 1), label=name)
        values = (pattern * (size // len(pattern) + 1))[:size]
        tree[name] = torch.tensor(values, dtype=torch.float32).reshape(p.shape)
    return tree


def bounds() -> st.SearchStrategy[float]:
    """Legal values of ``max_norm``, ``max_value`` and ``adaptive``."""
    # below and above what float32 holds, and where 1 / 1e-6 times it is above
    extremes = [1e-40, 1e36, 1e39, math.inf]
    return st.sampled_from([1e-6, 1e-3, 0.01, 1.0, 5.0, *extremes]) | st.floats(1e-8, 1e4)


def powers_of_two(low: int = -14, high: int = 24) -> st.SearchStrategy[float]:
    """Loss scales that are powers of two, so that multiplying rounds nothing."""
    return st.integers(low, high).map(lambda exponent: 2.0**exponent)


@st.composite
def loss_scales(draw: st.DrawFn, *, floor: float | None = None) -> LossScale:
    """Any legal loss scale; small intervals, so that short runs grow it."""
    return LossScale(
        scale=draw(powers_of_two(-126, 127) | st.floats(2.0**-126, 2.0**127)),
        growth_tracker=0,
        growth_factor=draw(st.sampled_from([2.0, 1.5, 1e30]) | st.floats(1.0, 16.0, exclude_min=True)),
        backoff_factor=draw(
            st.sampled_from([0.5, 0.25, 1e-30]) | st.floats(0.0, 1.0, exclude_min=True, exclude_max=True)
        ),
        growth_interval=draw(st.integers(1, 5)),
        floor=draw(st.sampled_from([0.0, 1.0, 2.0**-14])) if floor is None else floor,
    )


@st.composite
def partitions(draw: st.DrawFn, size: int) -> list[int]:
    """Sizes of the parts of ``size`` samples, in order: ragged ones, one part, or single samples."""
    parts: list[int] = []
    while (left := size - sum(parts)) > 0:
        parts.append(draw(st.integers(1, left)))
    return parts


def cuts(length: int) -> st.SearchStrategy[int]:
    """Where to stop a run of ``length`` batches: before the first, after the last, and anywhere between."""
    return st.integers(0, length)
