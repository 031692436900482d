"""The closed forms that torch tests its schedulers with, against our schedules and ``from_torch``, for each group."""

import math
from functools import reduce

import attrs
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as torch_schedulers
from torch.optim.swa_utils import SWALR

from steploop import (
    Optimizer,
    Rates,
    ReduceLROnPlateau,
    TrainState,
    constant,
    cosine_annealing,
    from_torch,
    one_cycle,
    schedule,
    step_lr,
)

BASES = (0.05, 0.5)  # of the two groups, as in torch's tests


def state_of(bases=BASES, momentum=0.9):
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    optimizer = Optimizer(torch.optim.SGD, lr=bases[0], momentum=momentum, groups=[("1.*", {"lr": bases[1]})])
    return TrainState.create(model, optimizer)


def in_each_group(learning_rate, steps, key="lr", bases=BASES):
    """What ``schedule`` puts into each group at each step: a list for each group."""
    state = state_of(bases)
    rows = []
    for step in range(steps):
        groups = schedule(attrs.evolve(state, applied_steps=step), learning_rate).hyper
        rows.append([float(group[key]) for group in groups])
    return [list(column) for column in zip(*rows, strict=True)]


def assert_follows(found, closed_forms):
    for group, (values, form) in enumerate(zip(found, closed_forms, strict=True)):
        for step, value in enumerate(values):
            assert math.isclose(value, form(step), rel_tol=1e-9, abs_tol=1e-15), (
                group,
                step,
                value,
                form(step),
            )


# --- closed forms ---------------------------------------------------------------------------------------------------


def half_cosine(high, low, part):
    return low + (high - low) * (1 + math.cos(math.pi * part)) / 2


def stairs(base, *, every, gamma=0.1):
    return lambda t: base * gamma ** (t // every)


def milestones(base, *, at, gamma=0.1):
    return lambda t: base * gamma ** sum(t >= m for m in at)


def held(base, *, factor, until):
    return lambda t: base * (factor if t < until else 1.0)


def line(base, *, start, end=1.0, steps):
    return lambda t: base * (start + (end - start) * min(t, steps) / steps)


def geometric(base, *, gamma):
    return lambda t: base * gamma**t


def power(base, *, steps, exponent):
    return lambda t: base * (1 - min(t, steps) / steps) ** exponent


def cosine(base, *, steps, low):
    return lambda t: half_cosine(base, low, t / steps)


def restarts(base, *, first, longer, low):
    def form(t):
        length = first
        while t >= length:
            t, length = t - length, length * longer
        return half_cosine(base, low, t / length)

    return form


def pieces(*forms, at):
    """Each form from its milestone on, with its own count of steps."""

    def form(t):
        last = sum(t >= m for m in at)
        return forms[last](t - ([0, *at][last]))

    return form


def product(base, *forms):
    return lambda t: base * math.prod(form(t) / base for form in forms)


def waves(low, high, *, up, down=None, size=lambda cycle, t: 1.0):
    down = down or up

    def form(t):
        cycle, place = divmod(t, up + down)
        height = place / up if place <= up else 1 - (place - up) / down
        return low + (high - low) * height * size(cycle, t)

    return form


def towards(base, end, *, steps, cosine):
    def form(t):
        part = min(1.0, t / steps)
        kept = (1 + math.cos(math.pi * part)) / 2 if cosine else 1 - part
        return end + (base - end) * kept

    return form


def of_each(form, **options):
    return [form(base, **options) for base in BASES]


FROM_TORCH = {
    "stairs": (lambda o: torch_schedulers.StepLR(o, 3, gamma=0.1), of_each(stairs, every=3)),
    "milestones": (
        lambda o: torch_schedulers.MultiStepLR(o, [2, 5, 9], gamma=0.1),
        of_each(milestones, at=(2, 5, 9)),
    ),
    "constant": (
        lambda o: torch_schedulers.ConstantLR(o, factor=0.5, total_iters=5),
        of_each(held, factor=0.5, until=5),
    ),
    "linear": (
        lambda o: torch_schedulers.LinearLR(o, start_factor=0.25, end_factor=0.6, total_iters=4),
        of_each(line, start=0.25, end=0.6, steps=4),
    ),
    "exponential": (lambda o: torch_schedulers.ExponentialLR(o, gamma=0.9), of_each(geometric, gamma=0.9)),
    "polynomial": (
        lambda o: torch_schedulers.PolynomialLR(o, total_iters=5, power=0.9),
        of_each(power, steps=5, exponent=0.9),
    ),
    "cosine": (
        lambda o: torch_schedulers.CosineAnnealingLR(o, T_max=20, eta_min=1e-3),
        of_each(cosine, steps=20, low=1e-3),
    ),
    "cosine that climbs again": (
        lambda o: torch_schedulers.CosineAnnealingLR(o, T_max=5, eta_min=1e-10),
        of_each(cosine, steps=5, low=1e-10),
    ),
    "restarts": (
        lambda o: torch_schedulers.CosineAnnealingWarmRestarts(o, T_0=5, T_mult=2, eta_min=1e-10),
        of_each(restarts, first=5, longer=2, low=1e-10),
    ),
    "a lambda for each group": (
        lambda o: torch_schedulers.LambdaLR(o, [lambda t: 0.9**t, lambda t: 0.8**t]),
        [geometric(BASES[0], gamma=0.9), geometric(BASES[1], gamma=0.8)],
    ),
    "a factor for each group": (
        lambda o: torch_schedulers.MultiplicativeLR(o, [lambda _: 0.9, lambda _: 0.8]),
        [geometric(BASES[0], gamma=0.9), geometric(BASES[1], gamma=0.8)],
    ),
    "one after another": (
        lambda o: torch_schedulers.SequentialLR(
            o,
            [
                torch_schedulers.ConstantLR(o, factor=0.1, total_iters=3),
                torch_schedulers.ExponentialLR(o, gamma=0.8),
                torch_schedulers.StepLR(o, step_size=2, gamma=0.1),
            ],
            milestones=[3, 6],
        ),
        [
            pieces(
                held(base, factor=0.1, until=3), geometric(base, gamma=0.8), stairs(base, every=2), at=(3, 6)
            )
            for base in BASES
        ],
    ),
    "all at once": (
        lambda o: torch_schedulers.ChainedScheduler(
            [
                torch_schedulers.ExponentialLR(o, gamma=0.9),
                torch_schedulers.ConstantLR(o, factor=0.2, total_iters=4),
                torch_schedulers.StepLR(o, step_size=3, gamma=0.1),
            ]
        ),
        [
            product(base, geometric(base, gamma=0.9), held(base, factor=0.2, until=4), stairs(base, every=3))
            for base in BASES
        ],
    ),
    "waves between absolute ends": (
        lambda o: torch_schedulers.CyclicLR(o, 1.0, 5.0, step_size_up=4, cycle_momentum=False),
        [waves(1.0, 5.0, up=4)] * 2,
    ),
    "waves of each group": (
        lambda o: torch_schedulers.CyclicLR(
            o,
            [1.0, 3.0],
            [5.0, 7.0],
            step_size_up=2,
            step_size_down=6,
            mode="triangular2",
            cycle_momentum=False,
        ),
        [waves(low, low + 4, up=2, down=6, size=lambda cycle, _: 0.5**cycle) for low in (1.0, 3.0)],
    ),
    "waves that shrink": (
        lambda o: torch_schedulers.CyclicLR(
            o, [1.0, 5.0], [5.0, 12.0], step_size_up=4, mode="exp_range", gamma=0.9, cycle_momentum=False
        ),
        [waves(low, high, up=4, size=lambda _, t: 0.9**t) for low, high in ((1.0, 5.0), (5.0, 12.0))],
    ),
    "one cycle": (
        lambda o: torch_schedulers.OneCycleLR(
            o, max_lr=0.25, total_steps=20, pct_start=0.3, final_div_factor=2.0, anneal_strategy="linear"
        ),
        [pieces(lambda t: 0.01 + 0.24 * t / 5, lambda t: 0.25 - 0.245 * t / 14, at=(5,))] * 2,
    ),
    "one cycle of each group": (
        lambda o: torch_schedulers.OneCycleLR(
            o, max_lr=[0.25, 2.5], total_steps=20, pct_start=0.3, final_div_factor=2.0
        ),
        [
            pieces(
                lambda t, top=top: half_cosine(0.04 * top, top, t / 5),
                lambda t, top=top: half_cosine(top, 0.02 * top, t / 14),
                at=(5,),
            )
            for top in (0.25, 2.5)
        ],
    ),
    "towards the rate of weight averaging": (
        lambda o: SWALR(o, swa_lr=0.01, anneal_epochs=5, anneal_strategy="cos"),
        [towards(base, 0.01, steps=5, cosine=True) for base in BASES],
    ),
    "towards a rate of each group": (
        lambda o: SWALR(o, swa_lr=[0.01, 0.02], anneal_epochs=4, anneal_strategy="linear"),
        [towards(base, end, steps=4, cosine=False) for base, end in zip(BASES, (0.01, 0.02), strict=True)],
    ),
}
# One schedule for each group, or ends that are absolute in each: the list of rates says how many groups there are.
BY_GROUP = {
    "a lambda for each group",
    "a factor for each group",
    "waves of each group",
    "waves that shrink",
    "one cycle of each group",
    "towards a rate of each group",
}


@pytest.mark.parametrize("name", FROM_TORCH)
def test_a_scheduler_of_torch_gives_each_group_its_closed_form(name):
    make, forms = FROM_TORCH[name]
    rates = BASES if name in BY_GROUP else BASES[0]
    assert_follows(in_each_group(from_torch(make, 20, lr=rates), 20), forms)


@pytest.mark.parametrize("name", FROM_TORCH)
def test_the_table_of_one_group_is_the_closed_form_of_the_first(name):
    make, forms = FROM_TORCH[name]
    rates = BASES if name in BY_GROUP else BASES[0]
    values = [from_torch(make, 20, lr=rates)(step) for step in range(20)]
    rates = [v.learning_rate if isinstance(v, Rates) else v for v in values]
    assert_follows([rates], forms[:1])


OURS = {
    "constant": (constant(0.05), of_each(held, factor=1.0, until=0)),
    "stairs": (step_lr(0.05, step_size=3, gamma=0.1), of_each(stairs, every=3)),
    "cosine with an absolute end": (
        cosine_annealing(0.05, total_steps=20, min_lr=1e-3),
        of_each(cosine, steps=20, low=1e-3),
    ),
    "one cycle with an absolute peak": (
        one_cycle(0.25, total_steps=20, pct_start=0.3, final_div_factor=2.0, anneal="linear"),
        FROM_TORCH["one cycle"][1],
    ),
    "a function of the step": (lambda t: 0.05 * 0.9**t, of_each(geometric, gamma=0.9)),
    "one for each group": (
        {0: step_lr(0.05, step_size=3), "1.*": lambda t: 0.4 * 0.8**t},
        [stairs(0.05, every=3), geometric(0.4, gamma=0.8)],
    ),
}


@pytest.mark.parametrize("name", OURS)
def test_a_schedule_of_ours_gives_each_group_its_closed_form(name):
    learning_rate, forms = OURS[name]
    assert_follows(in_each_group(learning_rate, 20), forms)


def test_a_cycle_moves_the_momentum_of_every_group_the_other_way():
    forms = [pieces(lambda t: 0.9 - 0.4 * t / 5, lambda t: 0.5 + 0.4 * t / 14, at=(5,))] * 2
    ours = one_cycle(0.25, total_steps=20, pct_start=0.3, anneal="linear", momentum=(0.5, 0.9))
    theirs = from_torch(
        lambda o: torch_schedulers.OneCycleLR(
            o, 0.25, 20, pct_start=0.3, anneal_strategy="linear", base_momentum=0.5, max_momentum=0.9
        ),
        20,
        lr=0.05,
    )
    for learning_rate in (ours, theirs):
        assert_follows(in_each_group(learning_rate, 20, "momentum"), forms)


def test_a_cycle_of_three_phases_comes_back_before_it_falls():
    """0.01 to 0.25 in 3 steps, back in 3, then down to a quarter of it in 3."""
    ours = one_cycle(
        0.25, total_steps=10, pct_start=0.4, final_div_factor=4.0, anneal="linear", three_phase=True
    )
    form = pieces(
        lambda t: 0.01 + 0.08 * t, lambda t: 0.25 - 0.08 * t, lambda t: 0.01 - 0.0025 * t, at=(3, 6)
    )
    assert_follows(in_each_group(ours, 10), [form] * 2)


# --- plateaus: metrics, and the rate after each of them --------------------------------------------------------------

PLATEAUS = {
    "slow but better by more than the threshold": (
        {"threshold_mode": "abs", "threshold": 0.01, "patience": 5, "cooldown": 5},
        [10 - 0.0167 * i for i in range(20)],
        [0.5] * 20,
    ),
    "too slow": (
        {"threshold_mode": "abs", "threshold": 0.1, "patience": 5},
        [10 - 0.0165 * i for i in range(22)],
        [0.5] * 6 + [0.05] * 7 + [0.005] * 7 + [0.0005] * 2,
    ),
    "a jump, then nothing": (
        {"mode": "max", "threshold_mode": "abs", "patience": 5, "cooldown": 5},
        [-0.8] * 2 + [-0.234] * 20,
        [0.5] * 8 + [0.05] * 11 + [0.005] * 3,
    ),
    "relative and fast enough": (
        {"mode": "max", "threshold_mode": "rel", "threshold": 0.1, "patience": 3},
        [1.5 * 1.025**i for i in range(20)],
        [0.5] * 20,
    ),
    "relative and too slow": (
        {"mode": "max", "threshold_mode": "rel", "threshold": 0.1, "patience": 5, "cooldown": 5},
        [1.5 * 1.005**i for i in range(20)],
        [0.5] * 6 + [0.05] * 11 + [0.005] * 3,
    ),
    "better just in time": (
        {"threshold_mode": "rel", "threshold": 0.1, "patience": 5, "cooldown": 5},
        [1.0] * 7 + [0.6] + [0.5] * 12,
        [0.5] * 6 + [0.05] * 11 + [0.005] * 3,
    ),
    "never below the least rate": (
        {
            "mode": "max",
            "threshold_mode": "rel",
            "threshold": 0.1,
            "patience": 5,
            "cooldown": 5,
            "min_lr": 0.4,
        },
        [1.5 * 1.005**i for i in range(20)],
        [0.5] * 6 + [0.4] * 14,
    ),
}


@pytest.mark.parametrize("name", PLATEAUS)
def test_a_plateau_lowers_the_rate_when_torch_does(name):
    options, metrics, expected = PLATEAUS[name]
    plateau = ReduceLROnPlateau(lr=0.5, **options)
    rates = [
        reduce(plateau.update, metrics[: n + 1], plateau.init()).learning_rate for n in range(len(metrics))
    ]
    assert rates == pytest.approx(expected, rel=1e-12)
