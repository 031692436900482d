"""What a schedule is, what it gives, and the checks that all of them share."""

from collections.abc import Callable

import attrs

from steploop.core.validators import integer, real, refuse


@attrs.frozen
class Rates:
    """What a schedule gives for one step when it cycles momentum too.

    Attributes:
        learning_rate: the learning rate, >= 0.
        momentum: SGD's momentum or Adam's beta1, in [0, 1).

    Example:
        >>> one_cycle(0.1, total_steps=10, momentum=(0.85, 0.95))(3)
        Rates(learning_rate=..., momentum=...)
    """

    learning_rate: float
    momentum: float


Schedule = Callable[[int], float | Rates]
"""From optimizer steps applied so far (0 before the first) to the rate of the next one."""

learning_rate = real(at_least=0.0, hint="Common values lie between 1e-5 and 1.")
min_learning_rate = real(
    at_least=0.0, hint="Give 0 to decay to nothing, or a small part of the highest rate."
)
total_steps = integer(at_least=1, hint="It counts optimizer steps: epochs * batches per epoch.")
some_steps = integer(at_least=0, hint="It counts optimizer steps; give 0 to leave this phase out.")


def check_min_lr(owner: object, *, min_lr: float, lr: float) -> None:
    """Refuse a lowest rate above the highest, which torch would silently turn into a rise."""
    if min_lr > lr:
        raise refuse(
            owner, "min_lr", f"<= the highest rate ({lr!r})", min_lr, "Lower min_lr or raise the rate."
        )
