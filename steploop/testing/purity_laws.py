"""Laws of a pure step: its input stays whole, only its arguments count, a spent state refuses use."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from steploop.core.state.train_state import TrainState
from steploop.core.steps.accumulation import accumulate
from steploop.core.steps.averaging import update_ema
from steploop.core.steps.backward import backward_scaled
from steploop.core.steps.clip import unscale_and_clip
from steploop.core.steps.evaluation import evaluate
from steploop.core.steps.forward import forward_loss
from steploop.core.steps.set_rates import schedule
from steploop.core.steps.update import optimizer_step
from steploop.errors import SpentStateError
from steploop.testing.hidden_changes import hidden_values, what_changed
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
    "SURROUNDINGS",
    "check_all_surroundings",
    "check_donation_equals_copy",
    "check_input_stays_whole",
    "check_same_input_same_result",
    "check_spent_state_refuses_use",
    "check_surroundings",
    "pure",
]

_AGAIN = (
    "the same state and batch must give the same result again (something outside of the state changes: a global, a closure, "
    "an attribute of the model, or random numbers that the state does not seed)"
)


def check_input_stays_whole(step: Step, state: State, batch: Any) -> None:
    """Law 1. A pure step does not change its input, which can be used again.

        v = values(s),  a = step(s, x),  b = step(s, x):      values(s) = v,   values(a) = values(b)

    Args:
        step: pure: ``optimizer_step(state, donate=False)`` in it, or `steploop.testing.pure` around it.
        state: usable afterwards.
        batch: what the step takes; must stay as it was too.

    Example:
        >>> check_input_stays_whole(pure(train_step), state, batch)
    """
    before, batch_before = copied(values(state)), copied(batch)
    first = step(state, batch)
    require_same(values(state), before, "a step must not change the state that went in")
    require_same(batch, batch_before, "a step must not change its batch")
    result, hidden = copied(values(first)), hidden_values(state)
    second = step(state, batch)
    _require_again(values(second), result, lambda: what_changed(hidden, hidden_values(state)))
    require_same(values(first), result, "a result must not change when its input is used again")


def _require_again(found: Any, expected: Any, culprit: Callable[[], str]) -> None:
    try:
        require_same(found, expected, _AGAIN)
    except AssertionError as error:
        raise AssertionError(f"{error}{culprit()}") from None


def pure(step: Step) -> Step:
    """Make any step pure: it works on a copy, and its input stays whole.

    Example:
        >>> after = pure(train_step)(state, batch)
        >>> state.alive
        True
    """
    return lambda state, batch: step(clone(state), batch)


def check_donation_equals_copy(step: Step, pure_step: Step, state: State, batch: Any) -> None:
    """Law 2. A donating step gives the bits of the pure one, and then its input refuses use.

        values(step(clone(s), x)) = values(pure_step(s, x)),      use(s) raises SpentStateError

    Args:
        step: gives its input's tensors to its result.
        pure_step: the same with ``optimizer_step(state, donate=False)``.
        state: is left whole.
        batch: what the steps take.

    Example:
        >>> check_donation_equals_copy(train_step, pure(train_step), state, batch)
    """
    expected = pure_step(state, batch)
    given = clone(state)
    result = step(given, batch)
    require_same(result, expected, "donation must not change a bit of the result")
    for spent in members(given).values():
        check_spent_state_refuses_use(spent, batch)


def check_spent_state_refuses_use(spent: TrainState, batch: Any) -> None:
    """Every use of a spent state raises SpentStateError, which says by what and what to do.

    Example:
        >>> after = train_step(state, batch)
        >>> check_spent_state_refuses_use(state, batch)
    """

    def objective(model: Any, _: Any) -> Any:
        return next(model.parameters()).sum()

    uses: dict[str, Callable[[], Any]] = {
        **{
            name: partial(getattr, spent, name)
            for name in ("params", "buffers", "slots", "ema", "grads", "model")
        },
        "clone()": spent.clone,
        "forward_loss": lambda: forward_loss(spent, batch, objective),
        "backward_scaled": lambda: backward_scaled(spent),
        "unscale_and_clip": lambda: unscale_and_clip(spent, max_norm=1.0),
        "optimizer_step": lambda: optimizer_step(spent),
        "schedule": lambda: schedule(spent, lambda _: 0.1),
        "accumulate": lambda: accumulate(spent, [batch], objective),
        "update_ema": lambda: update_ema(spent, decay=0.9),
        "evaluate": lambda: evaluate(spent, [batch], objective),
    }
    for name, use in uses.items():
        try:
            use()
        except SpentStateError as error:
            require(
                str(error).startswith(name) and "clone()" in str(error),
                f"the error of {name} on a spent state must say which use it was and what to do, but is: {error}",
            )
        else:
            raise AssertionError(f"{name} of a spent state must raise SpentStateError, but it gave a result.")


def check_same_input_same_result(step: Step, state: State, batches: Sequence[Any]) -> None:
    """The result depends on the state and the batches only, not on earlier calls.

        fold(clone(s), xs) = fold(clone(s), xs),    twice in a row: no counter, cache or closure moves on

    Args:
        step: any step.
        state: is left whole.
        batches: of the run.

    Example:
        >>> check_same_input_same_result(train_step, state, batches)
    """
    first, hidden = copied(values(fold(step, batches, clone(state)))), hidden_values(state)
    second = values(fold(step, batches, clone(state)))
    _require_again(second, first, lambda: what_changed(hidden, hidden_values(state)))


# --- surroundings ---------------------------------------------------------------------------------------------------


@contextmanager
def _other_generators(_: State) -> Iterator[None]:
    """Move torch's, Python's and NumPy's global generators; restore them on exit."""
    before = torch.default_generator.get_state(), random.getstate(), np.random.get_state()  # noqa: NPY002  (the global one)
    torch.default_generator.manual_seed(20_061_216)
    random.seed(20_061_216)
    np.random.seed(20_061_216)  # noqa: NPY002  (the global generator is the subject)
    drawn = torch.default_generator.get_state()
    try:
        yield
        same = torch.equal(torch.default_generator.get_state(), drawn)
        require(same, "a step must not move the caller's random numbers, but torch's generator has moved")
    finally:
        torch.default_generator.set_state(before[0])
        random.setstate(before[1])
        np.random.set_state(before[2])  # noqa: NPY002  (the global generator is the subject)


@contextmanager
def _models_in_eval_mode(state: State) -> Iterator[None]:
    modules = [module for s in members(state).values() for module in s.machine.model.modules()]
    before = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, training in zip(modules, before, strict=True):
            module.training = training


@contextmanager
def _float64_by_default(_: State) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
        require(
            torch.get_default_dtype() is torch.float64, "a step must not change the caller's default dtype"
        )
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _leftover_gradients(state: State) -> Iterator[None]:
    """Leave gradients in ``.grad``, as a forgotten ``backward()`` does."""
    leaves = [p for s in members(state).values() for p in s.params.values() if p.requires_grad]
    for leaf in leaves:
        leaf.grad = torch.full_like(leaf, 3.0)
    try:
        yield
    finally:
        for leaf in leaves:
            leaf.grad = None


@contextmanager
def _grad_mode(_: State, *, inference: bool) -> Iterator[None]:
    with torch.inference_mode() if inference else torch.no_grad():
        yield
        require(not torch.is_grad_enabled(), "a step must not change the caller's grad mode")


@contextmanager
def _autocast(state: State) -> Iterator[None]:
    device = next(iter(members(state).values())).device.type
    with torch.autocast(device, dtype=torch.bfloat16):
        yield


# What a caller may have left switched on: name -> a context for the call, made from the state that goes in.
SURROUNDINGS: Mapping[str, Callable[[State], AbstractContextManager[None]]] = {
    "other random numbers": _other_generators,
    "torch.no_grad()": partial(_grad_mode, inference=False),
    "torch.inference_mode()": partial(_grad_mode, inference=True),
    "autocast": _autocast,
    "float64 as the default dtype": _float64_by_default,
    "the model in eval mode": _models_in_eval_mode,
    "somebody's .grad": _leftover_gradients,
}


def check_surroundings(step: Step, state: State, batches: Sequence[Any], name: str) -> None:
    """Law 5. Settings that the caller left on change no bit, and stay as they were.

        fold(clone(s), xs) under the surrounding = fold(clone(s), xs)

    The run goes on for one more step outside of it: what was made inside must be usable there.

    Args:
        step: any step.
        state: is left whole.
        batches: of the run; the last one is taken outside.
        name: one of ``SURROUNDINGS``.

    Example:
        >>> check_surroundings(train_step, state, batches, "torch.no_grad()")
    """
    expected = copied(values(fold(step, batches, clone(state))))
    inside = clone(state)
    with SURROUNDINGS[name](inside):
        inside = fold(step, batches[:-1], inside)
    result = fold(step, batches[-1:], inside)
    require_same(values(result), expected, f"the result must not depend on {name}")


def check_all_surroundings(step: Step, state: State, batches: Sequence[Any]) -> None:
    """Run ``check_surroundings`` for each of ``SURROUNDINGS``.

    Example:
        >>> check_all_surroundings(train_step, state, batches)
    """
    for name in SURROUNDINGS:
        check_surroundings(step, state, batches, name)
