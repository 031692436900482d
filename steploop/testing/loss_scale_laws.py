"""Laws of the loss scale: powers of two change no bit; it follows torch's GradScaler."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from steploop.core.optimizer import Optimizer
from steploop.core.precision import LossScale
from steploop.core.state.parts import Gradients, InFlight
from steploop.core.state.train_state import TrainState
from steploop.core.steps.clip import unscale_and_clip
from steploop.core.steps.update import optimizer_step
from steploop.testing.clipping_laws import holding
from steploop.testing.state_comparison import Step, copied, fold, require, require_same, values

__all__ = [
    "check_scale_changes_no_bit",
    "check_scale_follows_torch",
    "check_scaled_steps_follow_torch",
    "in_float32",
]


def in_float32(objective: Callable[[nn.Module, Any], Any]) -> Callable[[nn.Module, Any], Any]:
    """Run the objective without autocast, because float16 would round small gradients away.

    Example:
        >>> fp16 = TrainState.create(model, optimizer, precision="fp16")
        >>> forward_loss(fp16, batch, in_float32(objective)).loss.dtype
        torch.float32
    """

    def unscaled(model: nn.Module, batch: Any) -> Any:
        device = next(model.parameters()).device.type
        with torch.autocast(device, enabled=False):
            return objective(model, batch)

    return unscaled


def check_scale_changes_no_bit(step: Step, state: TrainState, batches: Sequence[Any], scale: float) -> None:
    """Law 8. A loss scale that is a power of two changes no bit, if nothing overflows.

        params(fold(step, xs, s with S)) = params(fold(step, xs, s with 1))

    Args:
        step: computes in float32 (see ``in_float32``).
        state: of precision "fp16"; is left whole.
        batches: of the run.
        scale: S.

    Example:
        >>> def step(state, batch):
        ...     state = forward_loss(state, batch, in_float32(objective))
        ...     return optimizer_step(unscale_and_clip(backward_scaled(state), max_norm=1.0))
        >>> fp16 = TrainState.create(model, optimizer, precision="fp16")
        >>> check_scale_changes_no_bit(step, fp16, batches, 2.0**10)
    """
    require(math.frexp(scale)[0] == 0.5, f"the law is about powers of two, but the scale is {scale!r}")
    fixed = LossScale(scale=1.0, growth_interval=2**30, floor=0.0)
    plain = fold(step, batches, attrs.evolve(state.clone(), scale=fixed))
    scaled = fold(step, batches, attrs.evolve(state.clone(), scale=attrs.evolve(fixed, scale=scale)))
    require(scaled.nonfinite_steps == 0, f"nothing must overflow under a scale of {scale!r}")
    for name in ("params", "buffers", "slots", "applied_steps"):
        require_same(
            values(scaled)[name],
            values(plain)[name],
            f"a loss scale of {scale!r} must not change a bit of the {name}",
        )


def check_scale_follows_torch(scale: LossScale, finite: Sequence[bool]) -> None:
    """Law 9. Scale and tracker are those of ``torch.amp.GradScaler`` after every step, above the floor.

        S' = max(torch's S', floor),  n' = torch's n'

    Args:
        scale: to begin with.
        finite: whether the gradients of each step were.

    Example:
        >>> check_scale_follows_torch(LossScale(growth_interval=2), [True, False, True, True, True])
    """
    for index, good in enumerate(finite):
        expected_scale, expected_tracker = _torch_update(scale, good=good)
        scale = scale.updated(finite=good)
        if not good:
            expected_scale = max(expected_scale, scale.floor)
        found = (float(scale.scale), int(scale.growth_tracker))
        expected = (expected_scale, expected_tracker)
        require(
            found == expected,
            f"after step {index} scale and tracker must be torch's {expected}, but are {found}",
        )


def _torch_update(scale: LossScale, *, good: bool) -> tuple[float, int]:
    """Update a scale with torch's own kernel, which ``GradScaler.update()`` calls."""
    current = torch.tensor(float(scale.scale))
    tracker = torch.tensor(int(scale.growth_tracker), dtype=torch.int32)
    found_inf = torch.tensor(0.0 if good else 1.0)
    torch._amp_update_scale_(
        current, tracker, found_inf, scale.growth_factor, scale.backoff_factor, scale.growth_interval
    )
    return current.item(), int(tracker.item())


def check_scaled_steps_follow_torch(
    optimizer: Optimizer,
    params: Mapping[str, Tensor],
    grads: Sequence[Mapping[str, Tensor]],
    scale: LossScale,
) -> None:
    """Law 9. Parameters, slots, scale and tracker follow a loop written with ``torch.amp.GradScaler``, step by step.

    The scaled gradients of every step are given, finite or not; both unscale them, clip nothing, step and update.
    The floor is the only difference, and gradients that are finite as long as they are scaled but overflow float32
    afterwards, in themselves or in their norm: torch steps on those and we do not. The comparison ends there, and
    where the first step of torch's fused SGD is skipped, which leaves its momentum uninitialized.

    Args:
        optimizer: the description.
        params: name -> initial value.
        grads: name -> scaled gradient, one mapping a step.
        scale: to begin with, on the host.

    Example:
        >>> sgd, grads = Optimizer(torch.optim.SGD, lr=0.1), [{"w": torch.ones(2)}, {"w": torch.full((2,), 1e30)}]
        >>> check_scaled_steps_follow_torch(sgd, {"w": torch.zeros(2)}, grads, LossScale(scale=1e10))
    """
    module = nn.Module()
    for name, value in params.items():
        module.register_parameter(name, nn.Parameter(value.clone()))
    theirs, _ = optimizer.build(dict(module.named_parameters()))
    scaler = torch.amp.GradScaler(
        "cpu", float(scale.scale), scale.growth_factor, scale.backoff_factor, scale.growth_interval
    )
    scaler.scale(torch.zeros(()))  # makes its tensors
    state = holding(params, params, optimizer=optimizer, precision="fp16", loss_scale=scale)
    for index, tree in enumerate(grads):
        inverse = 1.0 / scaler.get_scale() if scaler.get_scale() else math.inf
        unscaled = [g * inverse for g in tree.values()]
        finite = all(g.isfinite().all() for g in tree.values())
        if finite and not math.isfinite(torch.nn.utils.get_total_norm(unscaled)):
            return
        if not finite and not state.step and isinstance(theirs, torch.optim.SGD) and theirs.defaults["fused"]:
            return
        for name, p in module.named_parameters():
            p.grad = tree[name].clone()
        _torch_step(scaler, theirs)
        state = state.replace(
            flight=InFlight(grads=Gradients([g.clone() for g in tree.values()]), loss=torch.zeros(()))
        )
        state = optimizer_step(unscale_and_clip(state, max_norm=math.inf), max_nonfinite_steps=10**9)
        after = values(state)
        expected = {name: p.detach() for name, p in module.named_parameters()}
        # a fused optimizer makes its slots in a skipped step too, all zero; ours makes them with the first one it takes
        begun = [(name, p) for name, p in module.named_parameters() if after["slots"][name] or state.step]
        slots = {name: dict(theirs.state[p]) for name, p in begun}
        require_same(
            copied(after["params"]),
            expected,
            f"after step {index} the parameters must equal those of GradScaler's loop",
        )
        require_same(
            {name: after["slots"][name] for name in slots},
            slots,
            f"after step {index} the optimizer's slots must equal those of GradScaler's loop",
        )
        found = float(after["scale"].scale), int(after["scale"].growth_tracker)
        torchs = max(scaler.get_scale(), scale.floor), scaler._get_growth_tracker()
        require(found == torchs, f"after step {index} scale and tracker must be {torchs}, but are {found}")


def _torch_step(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
    scaler.unscale_(optimizer)
    with warnings.catch_warnings():
        # torch's scaler warns about a step of an optimizer that was never called before a skip
        warnings.simplefilter("ignore")
        scaler.step(optimizer)
    scaler.update()
