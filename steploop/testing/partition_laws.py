"""Laws of accumulation and evaluation: the cut into batches does not matter, and evaluating changes nothing."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from steploop.core.precision import DTYPES
from steploop.core.state.train_state import TrainState
from steploop.core.steps.accumulation import accumulate
from steploop.core.steps.backward import backward_scaled
from steploop.core.steps.forward import forward_loss
from steploop.core.steps.objectives import Objective
from steploop.core.trees import count_samples, map_tensors, named_leaves
from steploop.testing.state_comparison import (
    State,
    Step,
    clone,
    copied,
    fold,
    members,
    require,
    require_same,
    values,
)

__all__ = [
    "Evaluation",
    "check_evaluation_changes_nothing",
    "check_evaluation_ignores_order",
    "check_evaluation_ignores_partition",
    "check_partition_gives_the_whole_gradient",
    "check_same_metrics",
    "split",
]

# evaluation(state, batches) -> {metric: value}
Evaluation = Callable[[Any, Sequence[Any]], Mapping[str, float | None]]

# Relative to the largest entry (or value). Float32 sums of the same numbers in another order differ by some EPS each.
TOLERANCE = 2e-5


def split(batch: Any, sizes: Sequence[int]) -> list[Any]:
    """Cut a batch into parts of these sizes, along the first axis of its tensors.

    Example:
        >>> split(torch.arange(5), [2, 3])
        [tensor([0, 1]), tensor([2, 3, 4])]
    """
    whole = count_samples(batch)
    require(whole == sum(sizes), f"the parts {list(sizes)} must add up to the {whole} samples of the batch")
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]

    def part(start: int, end: int) -> Any:
        return map_tensors(lambda t: t[start:end] if t.dim() and t.shape[0] == whole else t, batch)

    return [part(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def check_partition_gives_the_whole_gradient(
    state: TrainState, batch: Any, sizes: Sequence[int], objective: Objective, *, tolerance: float = TOLERANCE
) -> None:
    """Law 13. Any partition of a batch gives its loss and its gradient.

        accumulate(s, [x_1, ..., x_k]).grads = backward_scaled(forward_loss(s, x)).grads

    Not for BatchNorm, whose statistics are those of each part, nor for dropout, where each part draws its own mask;
    nor where the gradient of the whole batch is not finite, under a loss scale that is too high.

    Args:
        state: without BatchNorm and dropout; is left whole.
        batch: x.
        sizes: how many samples x_1, ..., x_k have.
        objective: a mean over the weight that it gives, or over the samples.
        tolerance: relative to the largest entry of all gradients, since a single one may be a sum that nearly cancels.
            Where all nearly do, they keep the rounding of their terms, which are of size 1 for most losses: an epsilon
            of the dtype that the state computes in, times the loss scale, is always allowed.

    Example:
        >>> check_partition_gives_the_whole_gradient(state, batch, [5, 2, 1], objective)
    """
    whole = backward_scaled(forward_loss(state.clone(), batch, objective))
    parts = accumulate(state.clone(), split(batch, sizes), objective)
    found, expected = (dict(s.grads or {}) for s in (parts, whole))
    require(
        list(found) == list(expected),
        f"a partition must reach the same parameters, but {list(found)} are not {list(expected)}",
    )
    if not all(bool(g.isfinite().all()) for g in expected.values()):
        return
    require_near = partial(_require_near, law=f"the partition {list(sizes)} must equal the whole batch")
    largest = max((float(g.abs().max()) for g in expected.values() if g.numel()), default=0.0)
    rounding = torch.finfo(DTYPES[state.precision]).eps
    if state.scale is not None:
        rounding *= float(state.scale.scale)
    for name, g in expected.items():
        require_near(name, found[name], g, max(tolerance * largest, rounding))
    require_near("the loss", parts.loss, whole.loss, tolerance * max(abs(float(whole.loss)), 1.0))  # type: ignore[arg-type]  # there is one


def _require_near(name: str, found: Any, expected: Any, allowed: float, *, law: str) -> None:
    error = float((found.double() - expected.double()).abs().max()) if expected.numel() else 0.0
    require(error <= allowed, f"{law}: {name} is off by {error:.3e} (allowed {allowed:.1e})")


def check_same_metrics(
    found: Mapping[str, float | None],
    expected: Mapping[str, float | None],
    law: str,
    tolerance: float = TOLERANCE,
) -> None:
    """Two evaluations agree in every metric, up to ``tolerance`` (relative, and absolute below 1)."""
    require(list(found) == list(expected), f"{law}: the metrics are {list(found)}, not {list(expected)}")
    for name, value in expected.items():
        other = found[name]
        if value is None or other is None or math.isnan(value):
            same = value is other or (value is not None and other is not None and math.isnan(other))
        else:
            same = abs(other - value) <= tolerance * max(abs(value), 1.0)
        require(same, f"{law}: {name} is {value!r} and {other!r}")


def check_evaluation_ignores_partition(
    evaluation: Evaluation, state: State, batch: Any, sizes: Sequence[int], *, tolerance: float = TOLERANCE
) -> None:
    """Law 14. evaluation(s, [x]) = evaluation(s, [x_1, ..., x_k]): the batch size does not matter.

    Args:
        evaluation: ``(state, batches) -> metrics``.
        state: is left whole.
        batch: x.
        sizes: how many samples x_1, ..., x_k have.
        tolerance: relative, and absolute below 1.

    Example:
        >>> check_evaluation_ignores_partition(lambda s, xs: evaluate(s, xs, objective), state, batch, [5, 3])
    """
    whole, parts = evaluation(state, [batch]), evaluation(state, split(batch, sizes))
    check_same_metrics(
        parts,
        whole,
        f"the evaluation of {sum(sizes)} samples must not depend on the partition {list(sizes)}",
        tolerance,
    )


def check_evaluation_ignores_order(
    evaluation: Evaluation, state: State, batches: Sequence[Any], *, tolerance: float = TOLERANCE
) -> None:
    """Law 14. evaluation(s, xs) = evaluation(s, reversed xs).

    Example:
        >>> check_evaluation_ignores_order(lambda s, xs: evaluate(s, xs, objective), state, batches)
    """
    forth, back = evaluation(state, batches), evaluation(state, list(batches)[::-1])
    check_same_metrics(
        back, forth, f"the evaluation of {len(batches)} batches must not depend on their order", tolerance
    )


def check_evaluation_changes_nothing(
    evaluate: Callable[[Any], Any], state: State, step: Step, batches: Sequence[Any]
) -> None:
    """Law 14. Evaluating changes no value, buffer, ``.grad``, random number or training mode.

        fold(s, xs) with an evaluation before each step = fold(s, xs)

    Args:
        evaluate: ``state -> metrics``.
        state: is left whole.
        step: any step.
        batches: of the run.

    Example:
        >>> check_evaluation_changes_nothing(lambda s: evaluate(s, batches, objective), state, train_step, batches)
    """
    expected = copied(values(fold(step, batches, clone(state))))
    current = clone(state)
    for batch in batches:
        before, surroundings = copied(values(current)), _surroundings(current)
        evaluate(current)
        require_same(values(current), before, "an evaluation must not change the state")
        require_same(_surroundings(current), surroundings, "an evaluation must not change its surroundings")
        current = step(current, batch)
    require_same(current, expected, "an evaluation must not change the training that follows")


def _surroundings(state: State) -> dict[str, Any]:
    """Collect what an evaluation could disturb outside of the state's values."""
    found: dict[str, Any] = {
        "torch's generator": torch.default_generator.get_state(),
        "grad mode": torch.is_grad_enabled(),
    }
    for name, member in members(state).items():
        model = member.model
        found[f"{name} training modes"] = {path: module.training for path, module in model.named_modules()}
        found[f"{name} .grad"] = {path: p.grad is None for path, p in model.named_parameters()}
        found[f"{name} values in the model"] = dict(
            copied(dict(named_leaves({**dict(model.named_parameters()), **dict(model.named_buffers())})))
        )
    return found
