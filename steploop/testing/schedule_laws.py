"""Laws of schedules: pure functions of the step that equal torch's schedulers."""

import warnings
from collections.abc import Callable

import torch
from torch.optim.lr_scheduler import LRScheduler

from steploop.core.schedules import Rates, Schedule
from steploop.core.state.train_state import TrainState
from steploop.core.steps.set_rates import schedule
from steploop.testing.state_comparison import require, require_same

__all__ = [
    "check_schedule_equals_torch",
    "check_schedule_is_a_function",
    "check_scheduling_is_idempotent",
    "torch_rates",
]


def torch_rates(
    make_scheduler: Callable[[torch.optim.Optimizer], LRScheduler],
    steps: int,
    *,
    lr: float = 0.1,
    momentum: float = 0.9,
) -> list[Rates]:
    """Tabulate the rate and momentum that a torch scheduler gives to every step."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr, momentum=momentum)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about chained schedulers, and about steps that change nothing
        scheduler = make_scheduler(optimizer)
        seen: list[Rates] = []
        while True:
            seen.append(Rates(optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
            if len(seen) == steps:
                return seen
            optimizer.step()
            scheduler.step()


def check_schedule_equals_torch(
    learning_rate: Schedule,
    make_scheduler: Callable[[torch.optim.Optimizer], LRScheduler],
    steps: int,
    *,
    lr: float = 0.1,
    momentum: float = 0.9,
    tolerance: Callable[[int], float] = lambda _: 0.0,
) -> None:
    """Law 12. learning_rate(t) is the rate of torch's scheduler at step t, for 0 <= t < steps.

    Args:
        learning_rate: the schedule.
        make_scheduler: makes torch's, given an optimizer of rate ``lr``.
        steps: how many steps to compare.
        lr: of torch's optimizer.
        momentum: of torch's optimizer.
        tolerance: step -> how far the rates may be apart; 0 where the bits agree. Momentum has to agree to the bit.

    Example:
        >>> check_schedule_equals_torch(
        ...     step_lr(0.1, step_size=3), lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=3), steps=10
        ... )
    """
    for step, expected in enumerate(torch_rates(make_scheduler, steps, lr=lr, momentum=momentum)):
        found = learning_rate(step)
        rate = found.learning_rate if isinstance(found, Rates) else found
        # two rates that have both outgrown every number are equal, and their difference is no number
        near = rate == expected.learning_rate or abs(rate - expected.learning_rate) <= tolerance(step)
        require(
            near,
            f"{learning_rate} at step {step} must be torch's {expected.learning_rate!r}, but is {rate!r}",
        )
        if isinstance(found, Rates):
            same = found.momentum == expected.momentum
            require(
                same,
                f"the momentum of {learning_rate} at step {step} must be torch's {expected.momentum!r}, but is {found.momentum!r}",
            )


def check_schedule_is_a_function(learning_rate: Schedule, steps: int) -> None:
    """Law 12. The rate of a step is the same at every call, in any order.

    Example:
        >>> check_schedule_is_a_function(cosine_annealing(0.1, total_steps=10), steps=10)
    """
    forth = [learning_rate(step) for step in range(steps)]
    back = [learning_rate(step) for step in reversed(range(steps))][::-1]
    require_same(back, forth, f"{learning_rate} must give the same rates backwards as forwards")


def check_scheduling_is_idempotent(state: TrainState, learning_rate: Schedule) -> None:
    """Law 12. schedule(schedule(s, f), f) = schedule(s, f): it follows the steps taken, not the calls.

    Example:
        >>> check_scheduling_is_idempotent(state, cosine_annealing(0.1, total_steps=10))
    """
    once = schedule(state, learning_rate)
    require_same(schedule(once, learning_rate), once, "scheduling twice must equal scheduling once")
