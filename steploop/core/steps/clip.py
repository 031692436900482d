"""``unscale_and_clip``: divide the gradients by the loss scale and bound them."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from steploop.core.precision import on_host
from steploop.core.state.parts import Gradients
from steploop.core.state.sharded import local_part
from steploop.core.state.surroundings import shielded
from steploop.core.state.train_state import TrainState
from steploop.core.steps.by_parts.sharded_steps import sharded_norm
from steploop.core.steps.clipping import check_bound, clip_adaptive, clip_norm, clip_value, global_norm
from steploop.errors import ConfigError, SpentStateError, StepOrderError

__all__ = ["unscale_and_clip"]


@shielded
def unscale_and_clip(
    state: TrainState,
    *,
    max_norm: float | None = None,
    max_value: float | None = None,
    adaptive: float | None = None,
) -> TrainState:
    """Divide the gradients by the loss scale, then bound them in one of three ways.

    With g all gradients as one flat vector, S the loss scale and u = g / S:

        max_norm:   clipped = u * min(1, max_norm / (||u|| + 1e-6))
        max_value:  clipped = min(max(u, -max_value), max_value), for every entry
        adaptive:   clipped = u * min(1, adaptive * max(||w||, 1e-3) / ||u||), for every output unit w

    Gradients that are not finite are not rescaled: ``optimizer_step`` sees ``finite`` and skips. A norm that
    overflows float32 counts as not finite (torch would multiply all gradients by 0).

    Works on the gradients in place: those of the state that went in are spent.

    Args:
        state: holds ``grads``, one tensor per parameter, of its shape.
        max_norm: bound on ||clipped||, in units of the *unscaled* gradient. ``inf`` measures and clips nothing.
        max_value: bound on every |entry|, in the same units.
        adaptive: bound on the ratio of gradient norm to weight norm of each output unit, typically 0.01 to 0.2.

    Returns:
        The state with true ``grads``, ``grad_norm`` (shape (), before clipping), ``clipped_norm`` and ``finite``.

    Raises:
        ConfigError: not exactly one bound was given, or it is not > 0.
        StepOrderError: there are no gradients (``backward_scaled`` comes before), or they are unscaled already.

    Source: Pascanu et al. 2013, https://arxiv.org/abs/1211.5063, with the 1e-6 of
    ``torch.nn.utils.clip_grad_norm_``; Brock et al. 2021, https://arxiv.org/abs/2102.06171.

    Example:
        >>> state = backward_scaled(forward_loss(state, batch, objective))
        >>> state = unscale_and_clip(state, max_norm=0.1)
        >>> float(state.clipped_norm) <= 0.1
        True
    """
    state.check_alive("unscale_and_clip")
    bound = _one_bound(max_norm, max_value, adaptive)
    held = state.flight.grads
    if held is None:
        raise StepOrderError(
            "unscale_and_clip: this state has no gradients. Call backward_scaled(state) before."
        )
    if state.grad_norm is not None:
        raise StepOrderError(
            "unscale_and_clip: these gradients are unscaled and clipped already. Call it once, after backward_scaled."
        )
    if held.taken_by is not None:
        raise SpentStateError(
            f"unscale_and_clip: the gradients of this state were given to {held.taken_by} already."
        )
    values = held.values
    grads = [g for g in values if g is not None]
    sharded = state.machine.module.sharded is not None
    if bound != "max_norm":
        _refuse_partial(bound, grads, sharded=sharded)
    held.taken_by = "unscale_and_clip"
    norm_of: Callable[[list[Tensor]], Tensor] = global_norm
    if sharded:
        grads, norm_of = [local_part(g) for g in grads], partial(sharded_norm, state)
    if state.scale is not None:
        _multiply(grads, state.scale.inverse())
    norm = norm_of(grads)
    clipped: float | Tensor
    if bound == "max_norm":
        clipped = clip_norm(grads, norm, max_norm)  # type: ignore[arg-type]  # it is the one that was given
    else:
        if bound == "max_value":
            clip_value(grads, max_value)  # type: ignore[arg-type]  # likewise
        else:
            pairs = zip(values, state.tensors.leaves, strict=True)
            clip_adaptive(grads, [leaf for g, leaf in pairs if g is not None], adaptive)  # type: ignore[arg-type]
        clipped = norm_of(grads)
    finite: bool | Tensor
    if isinstance(clipped, float):  # the norm was read, and what is clipped is finite if it was
        finite = math.isfinite(clipped)
    else:
        finite = math.isfinite(norm.item()) if on_host(norm) else torch.isfinite(norm)
    flight = state.flight.replace(
        grads=Gradients(values), grad_norm=norm, clipped_norm=clipped, finite=finite
    )
    return state.replace(flight=flight)


def _refuse_partial(bound: str, grads: list[Tensor], *, sharded: bool) -> None:
    """Refuse bounds that look at more of a gradient than is here."""
    if any(g.layout is not torch.strided for g in grads):
        raise ConfigError(
            f"unscale_and_clip: {bound} looks at every entry of a gradient, and a sparse one (nn.Embedding(sparse=True)) does "
            "not hold them all. Use max_norm, or a dense embedding."
        )
    if bound == "adaptive" and sharded:
        raise ConfigError(
            "unscale_and_clip: adaptive looks at whole vectors, and of a sharded parameter each rank has a part. Use max_norm or "
            "max_value."
        )


def _one_bound(max_norm: float | None, max_value: float | None, adaptive: float | None) -> str:
    if max_norm is not None and max_value is None and adaptive is None:  # the usual one, at every step
        check_bound("unscale_and_clip: max_norm", max_norm)
        return "max_norm"
    given = [
        (k, v)
        for k, v in (("max_norm", max_norm), ("max_value", max_value), ("adaptive", adaptive))
        if v is not None
    ]
    if len(given) != 1:
        names = ", ".join(name for name, _ in given) or "none"
        raise ConfigError(
            f"unscale_and_clip: give exactly one of max_norm, max_value and adaptive, but got {names}. "
            "max_norm=float('inf') measures the norm and clips nothing."
        )
    name, value = given[0]
    check_bound(f"unscale_and_clip: {name}", value)
    return name


def _multiply(grads: list[Tensor], factor: float | Tensor) -> None:
    if grads and (isinstance(factor, Tensor) or factor != 1.0):
        torch._foreach_mul_(grads, factor)
