"""Clipping: bound a list of gradients by their global norm, by value, or adaptively, in place.

These work on plain lists of tensors, know no state, and never rescale by a norm that is not finite.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from steploop.core.precision import float32, on_host
from steploop.errors import ConfigError

__all__ = ["check_bound", "clip_adaptive", "clip_norm", "clip_value", "global_norm"]

_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_ divides by norm + 1e-6
_EPS_32 = float32(_EPS)
_MIN_WEIGHT_NORM = 1e-3  # Brock et al. 2021, section 4.1: a zero-initialised weight must still train


def check_bound(name: str, value: float) -> None:
    """Raise ConfigError unless ``value`` is a number > 0 (inf is one, and clips nothing)."""
    if not value > 0:  # also false for nan
        raise ConfigError(f"{name} must be > 0 (inf measures the norm and clips nothing), but is {value!r}.")


def global_norm(grads: list[Tensor]) -> Tensor:
    """The L2 norm of all gradients as one flat vector, shape (); 0 for an empty list.

    One ``_foreach_norm`` over the list costs an eighth of ``clip_grad_norm_``'s bookkeeping per tensor on a
    small model, and has its bits.
    """
    if not grads:
        return torch.zeros(())
    try:
        norms = torch._foreach_norm(grads)
    except (
        NotImplementedError
    ):  # before torch 2.14 not of sparse gradients, whose norm is that of their values
        norms = torch._foreach_norm([g.coalesce().values() if g.is_sparse else g for g in grads])
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm


def clip_norm(grads: list[Tensor], norm: Tensor, max_norm: float) -> float | Tensor:
    """Multiply by min(1, max_norm / (norm + 1e-6)) in place; a norm that is not finite changes nothing.

    Returns:
        The norm afterwards: a float where the host can read ``norm`` for nothing, else a tensor of shape ().
    """
    if on_host(norm):
        before = norm.item()
        if not math.isfinite(before) or max_norm == math.inf:
            return before
        if before + _EPS < 0.9 * max_norm:  # the coefficient is above 1 in any precision, bf16 too
            return before
        coefficient = _coefficient(norm, before, max_norm)
        # where it is 1 or more, torch multiplies by 1, which changes no bit
        if coefficient < 1.0:
            torch._foreach_mul_(grads, torch.full((), coefficient, dtype=norm.dtype))
            return before * coefficient
        return before
    if max_norm == math.inf:
        return norm
    raw = torch.clamp(max_norm / (norm + _EPS), max=1.0)
    factor = torch.where(torch.isfinite(norm), raw, torch.ones_like(raw))
    torch._foreach_mul_(grads, factor)
    return norm * factor


def _coefficient(norm: Tensor, value: float, max_norm: float) -> float:
    """max_norm / (norm + 1e-6) in the norm's own precision, to the bit: 1 / x times max_norm, as torch divides.

    A float64 result of float32 operands that is rounded to float32 is the float32 result (Figueroa 1995): 53 bits are
    more than 2 * 24 + 2. Python does so in a tenth of the time of three calls on a 0-dim tensor.
    """
    if norm.dtype is torch.float32:
        return float32(float32(1.0 / float32(value + _EPS_32)) * float32(max_norm))
    return (max_norm / (norm + _EPS)).item()


def clip_value(grads: list[Tensor], max_value: float) -> None:
    """Clamp every entry to [-max_value, max_value] in place, as ``torch.nn.utils.clip_grad_value_``; nan stays."""
    # torch cannot convert a bound that the dtype does not hold: no finite entry exceeds it
    grads = [g for g in grads if max_value <= torch.finfo(g.dtype).max]
    if grads:
        torch._foreach_clamp_min_(grads, -max_value)
        torch._foreach_clamp_max_(grads, max_value)


def _unit_norm(x: Tensor) -> Tensor:
    """The norm of each output unit: over all axes but the first, kept; of the whole for vectors and scalars."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=tuple(range(1, x.dim())) or None, keepdim=True)
    return norm


def clip_adaptive(grads: list[Tensor], params: Sequence[Tensor], clipping: float) -> None:
    """Bound each output unit's gradient norm by ``clipping`` times its weight norm, in place.

    With g and w one unit of a gradient and of its parameter (a row of a linear layer, a filter of a
    convolution, the whole of a vector), and λ the clipping factor:

        bound = λ * max(||w||, 1e-3),    g <- g * bound / ||g||   where ||g|| > bound

    Source: Brock et al. 2021, https://arxiv.org/abs/2102.06171, equation 3.
    """
    for g, w in zip(grads, params, strict=True):
        bound = clipping * _unit_norm(w.detach()).clamp(min=_MIN_WEIGHT_NORM)
        norm = _unit_norm(g)
        factor = torch.where(norm > bound, bound / norm, torch.ones_like(norm))
        g.mul_(torch.where(torch.isfinite(norm), factor, torch.ones_like(norm)))
