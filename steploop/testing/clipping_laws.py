"""Laws of clipping: bounded, same direction, small gradients unchanged, torch's bits."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from steploop.core.optimizer import Optimizer
from steploop.core.state.parts import Gradients, InFlight, field_names
from steploop.core.state.train_state import TrainState
from steploop.core.steps.clip import unscale_and_clip
from steploop.core.steps.update import optimizer_step
from steploop.core.trees import map_tensors
from steploop.testing.state_comparison import Step, copied, norm64, require, require_same, values

__all__ = [
    "Clip",
    "check_a_batch_of_nan_changes_nothing",
    "check_adaptive_clip_bounds_each_unit",
    "check_clip_keeps_direction",
    "check_clip_leaves_small_gradients",
    "check_clip_norm_equals_torch",
    "check_clip_value_equals_torch",
    "check_clipping_twice_is_clipping_once",
    "check_norm_is_bounded",
    "check_only_finite_gradients_are_stepped_on",
    "holding",
    "steploop_clip",
]

# clip(gradients, bound) -> clipped gradients, of the same names and shapes
Clip = Callable[[Mapping[str, Tensor], float], Mapping[str, Tensor]]

# The relative error of float32 arithmetic: the norm of n entries, the quotient and the product round a few times each.
_EPS = torch.finfo(torch.float32).eps


def holding(
    grads: Mapping[str, Tensor], params: Mapping[str, Tensor] | None = None, **options: Any
) -> TrainState:
    """Make a state that has these gradients, as after ``backward_scaled``.

    Args:
        grads: name -> gradient, still multiplied by the loss scale if the state has one; copied.
        params: name -> value of the parameter; ones unless given.
        options: ``optimizer``, and what ``TrainState.create`` takes.

    Example:
        >>> holding({"w": torch.ones(2)}).grads["w"]
        tensor([1., 1.])
    """
    module = nn.Module()
    for name, g in grads.items():
        value = torch.ones_like(g) if params is None else params[name]
        module.register_parameter(name, nn.Parameter(value.detach().clone()))
    state = TrainState.create(module, options.pop("optimizer", Optimizer(torch.optim.SGD, lr=0.1)), **options)
    return state.replace(
        flight=InFlight(grads=Gradients([g.clone() for g in grads.values()]), loss=torch.zeros(()))
    )


def steploop_clip(kind: str, params: Mapping[str, Tensor] | None = None) -> Clip:
    """Apply ``unscale_and_clip(state, kind=bound)`` to gradients alone.

    Example:
        >>> steploop_clip("max_value")({"w": torch.tensor([3.0, -0.5])}, 1.0)["w"]
        tensor([ 1.0000, -0.5000])
    """

    def clip(grads: Mapping[str, Tensor], bound: float) -> Mapping[str, Tensor]:
        options: dict[str, Any] = {kind: bound}
        return unscale_and_clip(holding(grads, params), **options).grads or {}

    return clip


def check_norm_is_bounded(clip: Clip, grads: Mapping[str, Tensor], max_norm: float) -> None:
    """Law 6. ||clip(g, c)|| <= c, up to 8 roundings of float32 and those of a norm of n entries.

    Example:
        >>> check_norm_is_bounded(steploop_clip("max_norm"), {"w": torch.tensor([3.0, 4.0])}, 1.0)
    """
    after = norm64(clip(grads, max_norm).values())
    count = sum(g.numel() for g in grads.values())
    # below float32's normal numbers the unit is the smallest subnormal: in the bound, the quotient and each entry
    tiny = 2**-149 * (1 + norm64(grads.values()) + count)
    allowed = max_norm * (1 + (8 + count) * _EPS) + tiny
    require(
        after <= allowed, f"the norm after clipping must be at most max_norm = {max_norm!r}, but is {after!r}"
    )


def check_clip_keeps_direction(clip: Clip, grads: Mapping[str, Tensor], max_norm: float) -> None:
    """Law 6. clip(g, c) = k g with one k in [0, 1] for all entries, up to 2 roundings of each.

    Example:
        >>> check_clip_keeps_direction(steploop_clip("max_norm"), {"w": torch.tensor([3.0, 4.0])}, 1.0)
    """
    clipped = clip(grads, max_norm)
    flat = torch.cat([g.double().reshape(-1) for g in grads.values()])
    after = torch.cat([clipped[name].double().reshape(-1) for name in grads])
    if not flat.numel() or not flat.abs().max():
        require(not after.any(), "gradients of zero must stay zero")
        return
    k = (after[flat.abs().argmax()] / flat[flat.abs().argmax()]).item()
    require(0 <= k <= 1, f"clipping must multiply by a number in [0, 1], but multiplied by {k!r}")
    # below float32's normal numbers an entry keeps fewer bits: the smallest subnormal is the unit there
    error = (after - k * flat).abs() - (4 * _EPS * (k * flat).abs() + 2**-148)
    require(
        (error <= 0).all(),
        f"clipping must keep the direction, but entry {int(error.argmax())} is off by {float(error.max()):.3e}",
    )


def check_clip_leaves_small_gradients(clip: Clip, grads: Mapping[str, Tensor], max_norm: float) -> None:
    """Law 6. clip(g, c) = g bit for bit where c / (||g|| + 1e-6) >= 1 in float32, which is where torch multiplies by 1.

    Example:
        >>> check_clip_leaves_small_gradients(steploop_clip("max_norm"), {"w": torch.tensor([0.3, 0.4])}, 1.0)
    """
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads.values()]))
    if (max_norm / (norm + 1e-6)).item() >= 1.0:
        require_same(
            dict(clip(grads, max_norm)),
            dict(grads),
            f"clipping at {max_norm:g} must not change gradients of norm {norm.item():g}",
        )


def check_clipping_twice_is_clipping_once(
    clip: Clip, grads: Mapping[str, Tensor], bound: float, lower: float
) -> None:
    """Law 6. clip(clip(g, c), d) = clip(g, d) for d <= c, up to the roundings of two clips and torch's 1e-6.

    With u = c / (c + 1e-6) the factor by which torch's formula stays below the bound c, a relative 2 (1 - u) is allowed.

    Example:
        >>> check_clipping_twice_is_clipping_once(steploop_clip("max_norm"), {"w": torch.tensor([3.0, 4.0])}, 2.0, 1.0)
    """
    require(lower <= bound, "the second bound must be the smaller one")
    once, twice = clip(grads, lower), clip(clip(grads, bound), lower)
    slack = 64 * _EPS + 2e-6 / lower
    for name, g in once.items():
        gap = (g.double() - twice[name].double()).abs() - (slack * g.double().abs() + 2**-140)
        require(
            (gap <= 0).all(),
            f"clipping at {bound!r} and then at {lower!r} must equal clipping at {lower!r}: {name} is off by {float(gap.max()):.3e}",
        )


def check_clip_norm_equals_torch(clip: Clip, grads: Mapping[str, Tensor], max_norm: float) -> None:
    """Law 6. Gradients and norm equal those of ``torch.nn.utils.clip_grad_norm_``, if finite.

    Where the norm is not finite torch writes nan and 0 into the gradients; here they stay as they are, and the step
    is skipped.

    Example:
        >>> check_clip_norm_equals_torch(steploop_clip("max_norm"), {"w": torch.tensor([3.0, 4.0])}, 1.0)
    """
    leaves = [nn.Parameter(torch.zeros_like(g)) for g in grads.values()]
    for leaf, g in zip(leaves, grads.values(), strict=True):
        leaf.grad = g.clone()
    norm = torch.nn.utils.clip_grad_norm_(leaves, max_norm)
    expected: Any = dict(grads)
    if math.isfinite(norm):
        expected = {name: leaf.grad for name, leaf in zip(grads, leaves, strict=True)}
    require_same(dict(clip(grads, max_norm)), expected, f"clipping at {max_norm!r} must equal torch's")


def check_clip_value_equals_torch(clip: Clip, grads: Mapping[str, Tensor], max_value: float) -> None:
    """Law 6. The gradients equal those of ``torch.nn.utils.clip_grad_value_``, nan included.

    Example:
        >>> check_clip_value_equals_torch(steploop_clip("max_value"), {"w": torch.tensor([3.0, 4.0])}, 1.0)
    """
    leaves = [nn.Parameter(torch.zeros_like(g)) for g in grads.values()]
    for leaf, g in zip(leaves, grads.values(), strict=True):
        leaf.grad = g.clone()
    if max_value <= torch.finfo(torch.float32).max or max_value == math.inf:  # torch cannot convert others
        torch.nn.utils.clip_grad_value_(leaves, max_value)
    expected: Any = {name: leaf.grad for name, leaf in zip(grads, leaves, strict=True)}
    require_same(
        dict(clip(grads, max_value)), expected, f"clipping values at {max_value!r} must equal torch's"
    )


def check_adaptive_clip_bounds_each_unit(
    clip: Clip, grads: Mapping[str, Tensor], params: Mapping[str, Tensor], clipping: float
) -> None:
    """Law 6. For each output unit with gradient g and weight w, in float64 and up to the roundings of float32.

        clip(g) = g min(1, clipping max(||w||, 1e-3) / ||g||)

    Units whose norm overflows or underflows float32 are left out.

    Example:
        >>> params, grads = {"w": torch.ones(2, 3)}, {"w": torch.full((2, 3), 5.0)}
        >>> check_adaptive_clip_bounds_each_unit(steploop_clip("adaptive", params), grads, params, 0.1)
    """
    clipped = clip(grads, clipping)
    for name, grad in grads.items():
        rows = grad.reshape(grad.shape[0], -1) if grad.dim() > 1 else grad.reshape(1, -1)
        weights, found = (t.reshape(rows.shape).double() for t in (params[name], clipped[name]))
        for unit, (g, w, after) in enumerate(zip(rows.double(), weights, found, strict=True)):
            norm = g.norm().item()
            if not (norm == 0 or 1e-18 < norm < 1e18):
                continue
            factor = min(1.0, clipping * max(w.norm().item(), 1e-3) / norm) if norm else 1.0
            gap = (after - factor * g).abs() - ((16 + rows.shape[1]) * _EPS * factor * g.abs() + 2**-140)
            require(
                (gap <= 0).all(),
                f"unit {unit} of {name} must follow the definition of adaptive clipping, but is off by {float(gap.max()):.3e}",
            )


def check_only_finite_gradients_are_stepped_on(state: TrainState, **bound: float) -> None:
    """Law 7. A gradient or a norm that is not finite changes no parameter, slot or buffer.

        finite:      applied + 1,   nonfinite = 0
        else:        applied,       nonfinite + 1,    all values as they were;         attempted + 1 in both

    Args:
        state: with gradients, as from ``holding`` or ``backward_scaled``; is left whole.
        bound: what ``unscale_and_clip`` takes.

    Example:
        >>> check_only_finite_gradients_are_stepped_on(holding({"w": torch.tensor([1.0, float("nan")])}), max_norm=1.0)
    """
    before = copied(values(state))
    grads = list((state.grads or {}).values())
    inverse = 1.0 if state.scale is None else float(state.scale.inverse())
    scaled = [g * inverse for g in grads]
    norm = (
        torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in scaled]))
        if grads
        else torch.zeros(())
    )
    finite = math.isfinite(norm)
    after = values(optimizer_step(unscale_and_clip(state.clone(), **bound), max_nonfinite_steps=10**9))
    counts = {
        "attempted_steps": before["attempted_steps"] + 1,
        "applied_steps": before["applied_steps"] + finite,
        "nonfinite_steps": 0 if finite else before["nonfinite_steps"] + 1,
    }
    for name, expected in counts.items():
        require(
            after[name] == expected,
            f"after a step with a norm of {norm.item()}, {name} must be {expected}, but is {after[name]}",
        )
    if not finite:
        for name in ("params", "slots", "buffers", "ema"):
            require_same(after[name], before[name], f"a step that is not finite must not change the {name}")
        if state.scale is not None:
            require_same(
                after["scale"],
                attrs.evolve(state.scale.updated(finite=False)),
                "it must back the loss scale off",
            )


def check_a_batch_of_nan_changes_nothing(step: Step, state: TrainState, batch: Any) -> None:
    """Law 7. A batch full of nan is counted and changes no parameter, slot, buffer, average or carry.

    Args:
        step: any step.
        state: is left whole.
        batch: its dense floating-point tensors are replaced by nan; where the loss stays finite there is nothing to check.

    Example:
        >>> check_a_batch_of_nan_changes_nothing(train_step, state, batch)
    """

    def poison(t: Tensor) -> Tensor:
        dense = t.layout is torch.strided and not t.is_nested
        return torch.full_like(t, math.nan) if dense and t.is_floating_point() else t

    poisoned = map_tensors(poison, batch)
    before = copied(values(state))
    after = step(state.clone(), poisoned)
    if after.loss is not None and torch.isfinite(after.loss):
        return
    found = values(after)
    for name in (*field_names(type(state.tensors)), "applied_steps"):
        require_same(found[name], before[name], f"a batch of nan must not change the {name}")
    require(after.attempted_steps > before["attempted_steps"], "a skipped step must be counted")
