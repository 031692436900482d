"""Generate schedules, metric histories, early stopping and plateaus."""

import math
from typing import Any

from hypothesis import strategies as st

from steploop.core.early_stopping import EarlyStopping
from steploop.core.plateau import ReduceLROnPlateau
from steploop.core.schedules import (
    Schedule,
    constant,
    cosine_annealing,
    one_cycle,
    step_lr,
    warmup_cosine,
    warmup_stable_decay,
)

__all__ = ["early_stoppings", "histories", "plateaus", "schedules"]

_LENGTHS = st.integers(1, 60)
_FRACTIONS = st.floats(0.0, 1.0)


def histories(*, max_size: int = 30) -> st.SearchStrategy[list[float]]:
    """Metrics of one evaluation after another: ties, nan and infinities among them."""
    usual = st.floats(-3, 3) | st.integers(-3, 3).map(float)
    return st.lists(usual | st.sampled_from([math.nan, math.inf, -math.inf]), max_size=max_size)


@st.composite
def schedules(draw: st.DrawFn, *, momentum: bool = True) -> Schedule:
    """Any of this package's schedules; ``momentum=False`` leaves out those that cycle it."""
    lr = draw(st.floats(1e-8, 10.0), label="lr")
    min_lr = lr * draw(_FRACTIONS, label="min_lr / lr")
    total = draw(_LENGTHS, label="total_steps")
    kind = draw(
        st.sampled_from(["constant", "step_lr", "cosine", "one_cycle", "warmup_cosine", "warmup_stable"])
    )
    if kind == "constant":
        return constant(lr)
    if kind == "step_lr":
        return step_lr(lr, step_size=draw(st.integers(1, 20)), gamma=draw(st.floats(0.0, 2.0)))
    if kind == "cosine":
        return cosine_annealing(lr, total_steps=total, min_lr=min_lr)
    if kind == "warmup_cosine":
        return warmup_cosine(lr, warmup_steps=draw(st.integers(0, total)), total_steps=total, min_lr=min_lr)
    if kind == "warmup_stable":
        warmup, stable, decay = (
            draw(st.integers(0, 20), label=name) for name in ("warmup", "stable", "decay")
        )
        form: Any = draw(st.sampled_from(["linear", "cos", "sqrt"]))
        return warmup_stable_decay(
            lr, warmup_steps=warmup, stable_steps=stable, decay_steps=decay, min_lr=min_lr, decay=form
        )
    cycled = st.tuples(st.floats(0.0, 0.99), st.floats(0.0, 0.99)).map(lambda pair: (min(pair), max(pair)))
    return one_cycle(
        lr,
        total_steps=total,
        pct_start=draw(_FRACTIONS | st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.5, 1.0])),
        div_factor=draw(st.floats(1e-2, 1e3)),
        final_div_factor=draw(st.floats(1e-2, 1e6)),
        anneal=draw(st.sampled_from(["cos", "linear"])),
        momentum=draw(st.none() | cycled) if momentum else None,
        three_phase=draw(st.booleans()),
    )


def early_stoppings() -> st.SearchStrategy[EarlyStopping]:
    """Any early stopping; small patience, so that short histories stop it."""
    return st.builds(
        EarlyStopping,
        patience=st.integers(1, 6),
        min_delta=st.sampled_from([0.0, 1e-4, 0.1, 0.5, 1.0]) | st.floats(0, 5),
        mode=st.sampled_from(["min", "max"]),
    )


@st.composite
def plateaus(draw: st.DrawFn) -> ReduceLROnPlateau:
    """Any plateau; small patience, so that short histories lower the rate."""
    lr = draw(st.floats(0.0, 10.0))
    return ReduceLROnPlateau(
        lr=lr,
        mode=draw(st.sampled_from(["min", "max"])),
        factor=draw(st.floats(0.0, 1.0, exclude_max=True)),
        patience=draw(st.integers(0, 4)),
        threshold=draw(st.sampled_from([0.0, 1e-4, 0.1]) | st.floats(0.0, 1.0, exclude_max=True)),
        threshold_mode=draw(st.sampled_from(["rel", "abs"])),
        cooldown=draw(st.integers(0, 4)),
        min_lr=draw(st.just(0.0) | st.floats(0.0, lr)),
        eps=draw(st.sampled_from([0.0, 1e-8, 1e-2]) | st.floats(0.0, 1.0)),
    )
