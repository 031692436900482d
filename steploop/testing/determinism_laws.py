"""The law of deterministic operations: a step uses no operation that torch calls non-deterministic."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from steploop.testing.state_comparison import State, Step, clone, require

__all__ = ["check_operations_are_deterministic"]

_NAMED = re.compile(r"^(.*?) does not have a deterministic implementation")


def check_operations_are_deterministic(step: Step, state: State, batch: Any) -> None:
    """The step uses no operation without a deterministic implementation on this device.

    Args:
        step: any step.
        state: is left whole.
        batch: what the step takes.

    Example:
        >>> check_operations_are_deterministic(train_step, state, batch)
    """
    with _reported_by_torch() as found:
        step(clone(state), batch)
    texts = dict.fromkeys(str(warning.message).partition("\n")[0] for warning in found)
    names = [
        match.group(1) if (match := _NAMED.match(text)) else text for text in texts if "determin" in text
    ]
    require(
        not names,
        f"every operation must be deterministic, but torch reports {', '.join(names)}. Use another operation, or accept that two "
        "runs differ in their last bits.",
    )


@contextmanager
def _reported_by_torch() -> Iterator[list[warnings.WarningMessage]]:
    """Collect torch's warnings about non-deterministic operations, then restore its settings."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.use_deterministic_algorithms(mode=True, warn_only=True)
        try:
            yield found
        finally:
            torch.use_deterministic_algorithms(mode=before[0], warn_only=before[1])
