"""Choose the dtype of a step, and keep the dynamic loss scale of fp16 as a value."""

import math
import struct
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, get_args

import attrs
import torch
from torch import Tensor

from steploop.errors import ConfigError

__all__ = [
    "DTYPES",
    "LossScale",
    "Precision",
    "autocast",
    "best_precision",
    "check_precision",
    "float32",
    "on_host",
]

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}  # what products are computed in
_NO_AUTOCAST: AbstractContextManager[None] = nullcontext()
_FLOAT32 = struct.Struct("f")


def on_host(tensor: Tensor) -> bool:
    """Whether reading ``tensor`` costs no wait: it is a real CPU tensor, not being traced."""
    return type(tensor) is Tensor and tensor.is_cpu


def float32(x: float) -> float:
    """Round ``x`` to float32, to inf if it does not fit, as torch's scale does."""
    try:
        return _FLOAT32.unpack(_FLOAT32.pack(x))[0]  # type: ignore[no-any-return]
    except OverflowError:
        return math.inf


def _to_float32(value: Any) -> Any:
    """Round a number to float32; return anything else (a tensor, a mistake) unchanged."""
    return float32(value) if isinstance(value, int | float) else value


def _scale_is_legal(owner: "LossScale", attribute: Any, value: Any) -> None:
    # without a floor a scale can underflow to 0, as torch's does, and stays there; a tensor is not looked at
    if not isinstance(value, Tensor) and (value != 0 or owner.floor != 0):
        _positive(owner, attribute, value)


def _positive(_: Any, attribute: Any, value: Any) -> None:
    if not isinstance(value, Tensor) and not (math.isfinite(value) and value > 0):
        raise ConfigError(f"LossScale: {attribute.name} must be a finite number > 0, but is {value!r}.")


@attrs.frozen(kw_only=True)
class LossScale:
    """The dynamic loss scale of ``torch.amp.GradScaler``, as a value.

    With S the scale, n the tracker, f the growth factor and b the backoff factor, a step updates

        not finite:                 S <- max(S * b, floor),   n <- 0
        finite and n + 1 < interval:                          n <- n + 1
        finite and n + 1 = interval: S <- S * f,              n <- 0

    where the growth is left out if S * f exceeds float32. The floor is the one deviation from torch, whose
    scale can underflow to 0 (and the next finite step then writes nan weights). ``floor=0.0`` is torch's rule.

    Attributes:
        scale: S, what the loss is multiplied by; a float, or a 0-dim float32 tensor where the host must not wait.
        growth_tracker: finite steps in a row since the scale last changed; resets on growth and on a skip.
        growth_factor: f > 1.
        backoff_factor: b in (0, 1).
        growth_interval: finite steps in a row before the scale grows, >= 1.
        floor: lower bound of S, >= 0.

    Source: Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740; ``torch.amp.GradScaler``.

    Example:
        >>> LossScale(scale=1024.0).updated(False).scale
        512.0
    """

    scale: float | Tensor = attrs.field(default=2.0**16, converter=_to_float32, validator=_scale_is_legal)
    growth_tracker: int | Tensor = 0
    growth_factor: float = attrs.field(default=2.0, validator=_positive)
    backoff_factor: float = attrs.field(default=0.5, validator=_positive)
    growth_interval: int = attrs.field(default=2000, validator=_positive)
    floor: float = 1.0

    def __attrs_post_init__(self) -> None:
        """Refuse factors that would not grow or not back off."""
        if not self.growth_factor > 1.0:
            raise ConfigError(f"LossScale: growth_factor must be > 1, but is {self.growth_factor!r}.")
        if not self.backoff_factor < 1.0:
            raise ConfigError(f"LossScale: backoff_factor must be < 1, but is {self.backoff_factor!r}.")
        if not 0.0 <= self.floor < math.inf:
            raise ConfigError(f"LossScale: floor must be a finite number >= 0, but is {self.floor!r}.")

    def inverse(self) -> float | Tensor:
        """Return 1 / S, divided in float64 and rounded to float32 as torch does."""
        if isinstance(self.scale, Tensor):
            return self.scale.double().reciprocal().float()
        return float32(1.0 / self.scale) if self.scale else math.inf

    def updated(self, finite: bool | Tensor) -> "LossScale":
        """Return the scale after a step whose gradients were finite, or not."""
        if isinstance(finite, Tensor) or isinstance(self.scale, Tensor):
            return self._updated_on_device(torch.as_tensor(finite))
        if not finite:
            return attrs.evolve(
                self, scale=max(float32(self.scale * self.backoff_factor), self.floor), growth_tracker=0
            )
        tracker = int(self.growth_tracker) + 1
        if tracker < self.growth_interval:
            return attrs.evolve(self, growth_tracker=tracker)
        grown = float32(self.scale * self.growth_factor)
        return attrs.evolve(self, scale=grown if math.isfinite(grown) else self.scale, growth_tracker=0)

    def _updated_on_device(self, finite: Tensor) -> "LossScale":
        """Apply the rule by selections, so that the host need not know whether the step was finite."""
        scale = torch.as_tensor(self.scale, dtype=torch.float32, device=finite.device)
        tracker = torch.as_tensor(self.growth_tracker, device=finite.device) + 1
        grow = tracker >= self.growth_interval
        grown = (scale.double() * self.growth_factor).float()
        good = torch.where(grow & torch.isfinite(grown), grown, scale)
        bad = (scale.double() * self.backoff_factor).float().clamp(min=self.floor)
        return attrs.evolve(
            self,
            scale=torch.where(finite, good, bad),
            growth_tracker=torch.where(finite & ~grow, tracker, torch.zeros_like(tracker)),
        )


def check_precision(precision: str) -> None:
    """Raise ConfigError unless ``precision`` is one of fp32, bf16 and fp16."""
    if precision not in get_args(Precision):
        raise ConfigError(f"precision must be one of fp32, bf16 and fp16, but is {precision!r}.")


def autocast(precision: Precision, device_type: str) -> AbstractContextManager[Any]:
    """Make the autocast context of ``precision``; for fp32 an empty one."""
    if precision == "fp32":
        return _NO_AUTOCAST
    return torch.autocast(device_type, dtype=DTYPES[precision])


def best_precision(device: torch.device) -> tuple[Precision, str]:
    """Return the precision that suits a device best, and one sentence that says why.

    bf16 needs no loss scale, so it is taken wherever the hardware multiplies in it; fp16 where only that is fast.

    Example:
        >>> precision, why = best_precision(torch.device("cpu"))
        >>> precision in {"fp32", "bf16", "fp16"}
        True
    """
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "the GPU multiplies in bfloat16, which needs no loss scale"
        return "fp16", "the GPU multiplies in float16 but not in bfloat16; the loss is scaled"
    if device.type == "mps":
        return "fp16", "Apple GPUs multiply in float16; the loss is scaled"
    # oneDNN has bfloat16 kernels for these instruction sets; elsewhere it converts, and is slower than float32
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return "bf16", "the processor multiplies in bfloat16"
    return "fp32", "the processor has no bfloat16 arithmetic"
