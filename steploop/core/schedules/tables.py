"""Any torch scheduler as a schedule: run it once on a dummy optimizer and keep the table of what it gave."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from steploop.core.schedules.rates import Rates, learning_rate, total_steps
from steploop.core.validators import real, to_integer, to_real
from steploop.errors import ConfigError


@attrs.frozen(kw_only=True)
class Tabulated:
    """One value for each step, the last one held; made by `from_torch`.

    Attributes:
        scheduler: the class of torch that gave the values.
        total_steps: how many values there are, in optimizer steps.
        table: the values, those of step 0 first; of the first parameter group.
        groups: how many parameter groups' rates it was made with.
    """

    scheduler: str
    total_steps: int = attrs.field(converter=to_integer, validator=total_steps)
    table: tuple[float, ...] | tuple[Rates, ...] = attrs.field(repr=False)
    groups: int = attrs.field(default=1, repr=False)
    _for_groups: Callable[[tuple[float, ...]], "tuple[Tabulated, ...]"] | None = attrs.field(
        default=None, repr=False, eq=False
    )

    def __call__(self, step: int) -> float | Rates:
        """The value of the step after ``step`` (>= 0) applied ones."""
        return self.table[step] if step < self.total_steps else self.table[-1]

    def for_groups(self, factors: tuple[float, ...]) -> "tuple[Tabulated, ...]":
        """What torch gives to each of several parameter groups, whose rates begin at ``lr`` times these factors."""
        return (self,) * len(factors) if self._for_groups is None else self._for_groups(factors)


def _to_rates(lr: Any) -> tuple[Any, ...]:
    return tuple(map(to_real, lr)) if isinstance(lr, (list, tuple)) else (to_real(lr),)


def _check_rates(owner: object, attribute: "attrs.Attribute[Any]", rates: tuple[Any, ...]) -> None:
    for rate in rates:
        learning_rate(owner, attribute, rate)


@attrs.frozen(kw_only=True)
class _Request:
    """The numbers that `from_torch` was given, checked."""

    total_steps: int = attrs.field(converter=to_integer, validator=total_steps)
    lr: tuple[float, ...] = attrs.field(converter=_to_rates, validator=_check_rates)
    momentum: float = attrs.field(
        converter=to_real,
        validator=real(at_least=0.0, below=1.0, hint="Give what your optimizer starts with."),
    )


_Request.__name__ = "from_torch"  # whose arguments they are, for those who read a refusal


def from_torch(
    make_scheduler: Callable[[torch.optim.Optimizer], LRScheduler],
    total_steps: int,
    *,
    lr: float | Sequence[float] = 0.1,
    momentum: float = 0.9,
) -> Tabulated:
    """Tabulate a torch scheduler: the rate of each of ``total_steps`` steps, as torch itself computes it.

        table[t] = optimizer's rate after t calls of ``scheduler.step()``,    t = 0 .. total_steps - 1

    The scheduler is built on a dummy ``torch.optim.SGD``, and thrown away afterwards. Where it changes momentum too, the
    values are `Rates`. ``schedule`` gives each parameter group what torch gives it: it tabulates anew with as many groups
    as the state has, whose rates begin at ``lr`` in the proportion of the optimizer's. Example:

        from_torch(lambda optimizer: PolynomialLR(optimizer, total_iters=1000, power=2.0), 1000, lr=0.1)

    Args:
        make_scheduler: from an optimizer to a scheduler of ``torch.optim.lr_scheduler`` (or a subclass of
            ``LRScheduler``) whose values depend on the number of steps only.
        total_steps: how many optimizer steps to tabulate, >= 1; from then on the last value is held. Tabulating costs 30 to 45 us a step, once.
        lr: the learning rate that the scheduler starts from, >= 0; or one for each parameter group, for a scheduler that
            takes lists (``OneCycleLR(optimizer, max_lr=[0.1, 0.01], ...)``).
        momentum: the momentum that it starts from, in [0, 1).

    Returns:
        A frozen schedule, ``step -> learning rate`` or ``step -> Rates``.

    Raises:
        ConfigError: an argument is outside its range; the scheduler follows a metric (use
            ``steploop.core.plateau.ReduceLROnPlateau``), fails, or gives a rate that is no finite number >= 0.

    Example:
        >>> scheduler = torch.optim.lr_scheduler.ExponentialLR
        >>> table = from_torch(lambda optimizer: scheduler(optimizer, gamma=0.5), lr=0.1, total_steps=3)
        >>> [table(step) for step in range(3)]
        [0.1, 0.05, 0.025]
    """
    request = _Request(total_steps=total_steps, lr=lr, momentum=momentum)
    if not callable(make_scheduler):
        raise ConfigError(
            "from_torch: make_scheduler must be a function from an optimizer to a torch scheduler, "
            f"got {make_scheduler!r}. Give for instance lambda optimizer: StepLR(optimizer, step_size=30)."
        )
    return _tabulated(make_scheduler, request, request.lr)[0]


def _tabulated(
    make_scheduler: Callable[[torch.optim.Optimizer], LRScheduler],
    request: _Request,
    rates: tuple[float, ...],
) -> tuple[Tabulated, ...]:
    """The tables of as many groups as there are ``rates``."""
    groups = [{"params": [torch.zeros(1)], "lr": lr} for lr in rates]
    optimizer = torch.optim.SGD(groups, lr=rates[0], momentum=request.momentum)
    values: list[list[Rates]] = []
    # Torch warns about how a scheduler is used in a training loop; this is none, so that nothing there is news.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            scheduler = make_scheduler(optimizer)
            _refuse_unless_a_function_of_the_step(scheduler)
            optimizer.step()  # without a gradient it changes nothing; torch wants it before scheduler.step()
            while True:
                values.append([_read(group, step=len(values)) for group in optimizer.param_groups])
                if len(values) == request.total_steps:
                    break
                scheduler.step()
        except ConfigError:
            raise
        except Exception as error:
            many = "one parameter group" if len(rates) == 1 else f"{len(rates)} parameter groups"
            raise ConfigError(
                f"from_torch: the scheduler must run for total_steps = {request.total_steps} steps on an SGD of {many}, "
                f"but at step {len(values)} it failed with {type(error).__name__}: {str(error).rstrip('.')}. "
                "Correct its arguments, give lr a list with the rate of each group, or give fewer total_steps."
            ) from error

    def for_groups(factors: tuple[float, ...]) -> tuple[Tabulated, ...]:
        if len(request.lr) == 1:
            return _tabulated(make_scheduler, request, tuple(request.lr[0] * f for f in factors))
        if len(request.lr) != len(factors):
            raise ConfigError(
                f"from_torch: lr has the rates of {len(request.lr)} parameter groups, but the optimizer has {len(factors)}. Give "
                "one for each of its groups, or a single one, which every group takes in proportion."
            )
        return _tabulated(make_scheduler, request, request.lr)

    made = []
    for group in zip(*values, strict=True):
        cycles = any(value.momentum != request.momentum for value in group)
        table = group if cycles else tuple(value.learning_rate for value in group)
        name = type(scheduler).__name__
        made.append(
            Tabulated(
                scheduler=name,
                total_steps=request.total_steps,
                table=table,
                groups=len(request.lr),
                for_groups=for_groups,
            )
        )
    return tuple(made)


def _refuse_unless_a_function_of_the_step(scheduler: object) -> None:
    """Raise ConfigError for what is no scheduler, and for one that follows a metric (inside others torch refuses it)."""
    if not isinstance(scheduler, LRScheduler):
        raise ConfigError(
            f"from_torch: make_scheduler must return a torch.optim.lr_scheduler.LRScheduler, got {scheduler!r}. "
            "Return the scheduler that it builds."
        )
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ConfigError(
            "from_torch: make_scheduler must return a scheduler that is a function of the step, got "
            "ReduceLROnPlateau, which follows a metric. Use steploop.core.plateau.ReduceLROnPlateau, a fold over the metric."
        )


def _read(group: Mapping[str, Any], *, step: int) -> Rates:
    """The rates that the scheduler left in a group, as plain floats."""
    rates = Rates(float(group["lr"]), float(group["momentum"]))
    if not (math.isfinite(rates.learning_rate) and rates.learning_rate >= 0.0 <= rates.momentum < 1.0):
        raise ConfigError(
            "from_torch: the scheduler must give a finite learning rate >= 0 and a momentum in [0, 1) at every step, "
            f"got {rates} at step {step}. Correct its arguments, or give fewer total_steps."
        )
    return rates
