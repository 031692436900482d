"""Schedules are torch's: every step, every legal hyperparameter; illegal ones are refused by name."""

import math

import attrs
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from steploop import schedule as set_schedule
from steploop.core.schedules import (
    Rates,
    constant,
    cosine_annealing,
    from_torch,
    one_cycle,
    step_lr,
    warmup_cosine,
    warmup_stable_decay,
)
from steploop.errors import ConfigError
from steploop.testing import (
    check_schedule_equals_torch,
    check_schedule_is_a_function,
    check_scheduling_is_idempotent,
    strategies,
)
from steploop.testing.schedule_laws import torch_rates
from steploop.testing.strategies import Task

EPS = 2.0**-52

rates = st.floats(1e-8, 10.0)
fractions = st.floats(0.0, 1.0)
lengths = st.integers(1, 120)


def by_hand(make_scheduler, steps, *, lr=0.1, momentum=0.9):
    """The (rate, momentum) of every step as a training loop with torch's scheduler sees them."""
    return [
        (r.learning_rate, r.momentum) for r in torch_rates(make_scheduler, steps, lr=lr, momentum=momentum)
    ]


# --- law 12: equal to torch, step for step --------------------------------------------------------------------------


@given(lr=rates, step_size=st.integers(1, 20), gamma=st.floats(0.0, 2.0), steps=lengths)
def test_step_lr_equals_torch_at_every_step(lr, step_size, gamma, steps):
    """Torch multiplies once a drop: one rounding (half an EPS) for each, and one more for the power."""
    schedule = step_lr(lr, step_size=step_size, gamma=gamma)

    def tolerance(step):
        # the absolute part is for numbers so small that they have lost bits
        return max(schedule(step) * EPS * (step // step_size + 2), 1e-300)

    check_schedule_equals_torch(
        schedule,
        lambda o: lr_scheduler.StepLR(o, step_size=step_size, gamma=gamma),
        steps,
        lr=lr,
        tolerance=tolerance,
    )


@given(lr=rates, part=fractions, total=lengths)
def test_cosine_annealing_equals_torch_until_its_end(lr, part, total):
    """Torch's recursion is off by about one rounding of ``lr`` a step; its own closed form agrees to the bit."""
    min_lr = part * lr
    schedule = cosine_annealing(lr, total_steps=total, min_lr=min_lr)
    check_schedule_equals_torch(
        schedule, lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=total, eta_min=min_lr), total + 1, lr=lr,
        tolerance=lambda step: 4 * EPS * lr * (step + 1),
    )  # fmt: skip
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, T_max=total, eta_min=min_lr)
    for step in range(total):
        scheduler.last_epoch = step
        assert schedule(step) == scheduler._get_closed_form_lr()[0]


@given(lr=rates, part=fractions, total=lengths, beyond=st.integers(0, 1000))
def test_cosine_annealing_holds_min_lr_from_its_end_on(lr, part, total, beyond):
    """A documented deviation: torch's climbs back to ``lr``."""
    assert cosine_annealing(lr, total_steps=total, min_lr=part * lr)(total + beyond) == part * lr


@settings(max_examples=max(300, settings.default.max_examples))
@given(
    max_lr=st.floats(0.0, 10.0),
    total=lengths,
    pct_start=fractions | st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.5, 1.0]),
    div=st.floats(1e-2, 1e3),
    final_div=st.floats(1e-2, 1e6),
    anneal=st.sampled_from(["cos", "linear"]),
    momentum=st.none()
    | st.tuples(st.floats(0.0, 0.99), st.floats(0.0, 0.99)).map(lambda m: tuple(sorted(m))),
    three_phase=st.booleans(),
)
def test_one_cycle_is_torchs_to_the_bit(
    max_lr, total, pct_start, div, final_div, anneal, momentum, three_phase
):
    """Every step of every legal one-cycle: rate and momentum, wherever torch does not divide by zero."""
    assume(pct_start * total != 1.0)
    schedule = one_cycle(
        max_lr,
        total_steps=total,
        pct_start=pct_start,
        div_factor=div,
        final_div_factor=final_div,
        anneal=anneal,
        momentum=momentum,
        three_phase=three_phase,
    )

    def torchs(optimizer):
        base, top = momentum or (0.85, 0.95)
        return lr_scheduler.OneCycleLR(
            optimizer,
            max_lr,
            total_steps=total,
            pct_start=pct_start,
            anneal_strategy=anneal,
            cycle_momentum=momentum is not None,
            base_momentum=base,
            max_momentum=top,
            div_factor=div,
            final_div_factor=final_div,
            three_phase=three_phase,
        )

    check_schedule_equals_torch(schedule, torchs, total)
    assert isinstance(schedule(0), float) == (momentum is None)
    assert schedule(total) == schedule(total + 57) == schedule(total - 1)  # torch rises again, then raises


@pytest.mark.parametrize("anneal", ["cos", "linear"])
@pytest.mark.parametrize("three_phase", [False, True])
def test_one_cycle_in_two_and_three_phases_is_torchs(anneal, three_phase):
    options = {"total_steps": 20, "pct_start": 0.3, "div_factor": 10.0, "final_div_factor": 100.0}
    options |= {"three_phase": three_phase}
    schedule = one_cycle(0.5, anneal=anneal, momentum=(0.85, 0.95), **options)
    check_schedule_equals_torch(
        schedule, lambda o: lr_scheduler.OneCycleLR(o, 0.5, anneal_strategy=anneal, **options), 20
    )
    assert schedule(20) == schedule(21) == schedule(77) == schedule(19)


@pytest.mark.parametrize(("total", "pct_start"), [(10, 0.1), (2, 0.5), (1, 1.0), (4, 0.25)])
@pytest.mark.parametrize("three_phase", [False, True])
def test_one_cycle_starts_at_its_peak_where_torch_divides_by_zero(total, pct_start, three_phase):
    with pytest.raises(ZeroDivisionError):
        by_hand(lambda o: lr_scheduler.OneCycleLR(o, 1.0, total_steps=total, pct_start=pct_start), total)
    schedule = one_cycle(
        1.0, total_steps=total, pct_start=pct_start, three_phase=three_phase, momentum=(0.85, 0.95)
    )
    values = [schedule(step) for step in range(total)]
    assert values[0] == Rates(1.0, 0.85)
    assert all(later.learning_rate < 1.0 for later in values[1:])
    if total > 1:
        assert values[-1].learning_rate == pytest.approx(1 / 25e4)


def test_one_cycle_starts_peaks_and_ends_where_torch_has_them():
    """max/25 at step 0, the maximum at pct_start * T - 1 (0-based), max/(25 * 1e4) at T - 1; a cosine both ways."""
    schedule = one_cycle(0.2, total_steps=100)
    assert schedule(0) == pytest.approx(0.2 / 25, rel=1e-14)
    assert schedule(29) == 0.2
    assert max(range(100), key=schedule) == 29
    assert schedule(99) == pytest.approx(0.2 / (25 * 1e4), rel=1e-12)
    halfway = 29 / 2
    assert schedule(14) == pytest.approx(
        0.2 + (0.008 - 0.2) / 2 * (1 + math.cos(math.pi * 14 / 29)), rel=1e-12
    )
    assert (
        schedule(14) < 0.008 + (0.2 - 0.008) * 14 / halfway / 2
    )  # below the straight line, as a cosine is at first


def test_a_straight_line_can_take_the_place_of_the_rise_alone():
    """The rise is linear in rate and momentum, the fall still torch's cosine."""
    line = one_cycle(0.2, total_steps=100, rise="linear", momentum=(0.85, 0.95))
    cosine = one_cycle(0.2, total_steps=100, momentum=(0.85, 0.95))
    for step in range(30):
        assert line(step).learning_rate == pytest.approx(0.008 + (0.2 - 0.008) * step / 29, rel=1e-12)
        assert line(step).momentum == pytest.approx(0.95 - 0.1 * step / 29, rel=1e-12)
    assert [line(step) for step in range(30, 100)] == [cosine(step) for step in range(30, 100)]
    other = one_cycle(0.2, total_steps=100, anneal="linear", rise="cos")
    assert [other(step) for step in range(30)] == [cosine(step).learning_rate for step in range(30)]
    assert other(64) == pytest.approx(0.2 - (0.2 - 8e-7) * 35 / 70, rel=1e-12)


@given(lr=rates, part=fractions, warmup=st.integers(2, 60), cosine=st.integers(1, 60))
def test_warmup_cosine_equals_torchs_linear_then_cosine(lr, part, warmup, cosine):
    """LinearLR from 1/W, then CosineAnnealingLR over T - W, in SequentialLR."""
    schedule = warmup_cosine(lr, warmup_steps=warmup, total_steps=warmup + cosine, min_lr=part * lr)

    def torchs(optimizer):
        rise = lr_scheduler.LinearLR(
            optimizer, start_factor=1 / warmup, end_factor=1.0, total_iters=warmup - 1
        )
        fall = lr_scheduler.CosineAnnealingLR(optimizer, T_max=cosine, eta_min=part * lr)
        return lr_scheduler.SequentialLR(optimizer, [rise, fall], milestones=[warmup])

    check_schedule_equals_torch(
        schedule, torchs, warmup + cosine, lr=lr, tolerance=lambda step: 8 * EPS * lr * (step + 1)
    )


@given(lr=rates, warmup=st.integers(1, 1000), rest=st.integers(0, 1000))
def test_the_first_step_of_a_warmup_already_trains(lr, warmup, rest):
    """(t + 1) / W as in torchtitan: lr / W first, the whole lr at step W - 1, never 0."""
    for schedule in (
        warmup_cosine(lr, warmup_steps=warmup, total_steps=warmup + rest),
        warmup_stable_decay(lr, warmup_steps=warmup, stable_steps=0, decay_steps=rest),
    ):
        assert schedule(0) == pytest.approx(lr / warmup, rel=1e-15)
        assert schedule(warmup - 1) == lr


@given(lr=rates, part=fractions, total=lengths)
def test_a_warmup_of_the_whole_run_divides_nothing_by_zero(lr, part, total):
    """No cosine, no decay: the rate rises to the last step and is min_lr beyond it."""
    for schedule in (
        warmup_cosine(lr, warmup_steps=total, total_steps=total, min_lr=part * lr),
        warmup_stable_decay(lr, warmup_steps=total, stable_steps=0, decay_steps=0, min_lr=part * lr),
    ):
        assert [schedule(step) for step in range(total)] == [
            lr * ((step + 1) / total) for step in range(total)
        ]
        assert schedule(total) == schedule(total + 9) == part * lr


@given(lr=rates, part=fractions, total=lengths)
def test_no_warmup_is_cosine_annealing(lr, part, total):
    schedule = warmup_cosine(lr, warmup_steps=0, total_steps=total, min_lr=part * lr)
    cosine = cosine_annealing(lr, total_steps=total, min_lr=part * lr)
    for step in range(total + 3):
        assert schedule(step) == pytest.approx(cosine(step), abs=4 * EPS * lr)


@given(lr=rates, warmup=st.integers(2, 30), stable=st.integers(1, 30), decay=st.integers(1, 30))
def test_warmup_stable_decay_equals_torchs_three_in_a_row(lr, warmup, stable, decay):
    """LinearLR, ConstantLR, LinearLR in SequentialLR, until the decay is over."""
    schedule = warmup_stable_decay(lr, warmup_steps=warmup, stable_steps=stable, decay_steps=decay)
    assert schedule.total_steps == warmup + stable + decay

    def torchs(optimizer):
        return lr_scheduler.SequentialLR(
            optimizer,
            [
                lr_scheduler.LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup - 1),
                lr_scheduler.ConstantLR(optimizer, factor=1.0),
                lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=decay),
            ],
            milestones=[warmup, warmup + stable],
        )

    check_schedule_equals_torch(
        schedule, torchs, schedule.total_steps, lr=lr, tolerance=lambda step: 8 * EPS * lr * (step + 1)
    )
    assert schedule(schedule.total_steps) == schedule(schedule.total_steps + 5) == 0.0


def test_the_forms_of_the_decay_are_those_of_their_equations():
    def decay(form):
        schedule = warmup_stable_decay(
            1.0, warmup_steps=0, stable_steps=3, decay_steps=8, min_lr=0.2, decay=form
        )
        return [schedule(step) for step in range(3, 12)]

    parts = [step / 8 for step in range(9)]
    assert decay("linear") == pytest.approx([0.2 + 0.8 * (1 - u) for u in parts])
    assert decay("cos") == pytest.approx([0.2 + 0.4 * (1 + math.cos(math.pi * u)) for u in parts])
    assert decay("sqrt") == pytest.approx([0.2 + 0.8 * (1 - u**0.5) for u in parts])
    plateau = warmup_stable_decay(1.0, warmup_steps=2, stable_steps=3, decay_steps=8)
    assert [plateau(step) for step in range(2, 6)] == [1.0, 1.0, 1.0, 1.0]
    assert plateau(6) == 1 - 1 / 8


@given(schedule=strategies.schedules(), steps=st.integers(1, 80))
def test_every_schedule_is_a_function_of_the_step(schedule, steps):
    check_schedule_is_a_function(schedule, steps)


@given(schedule=strategies.schedules())
def test_scheduling_a_state_twice_is_scheduling_it_once(schedule):
    state = Task().state()
    check_scheduling_is_idempotent(state, schedule)
    after = set_schedule(state.replace(applied_steps=5), schedule)
    value = schedule(5)
    assert after.learning_rate == (value.learning_rate if isinstance(value, Rates) else value)
    if isinstance(value, Rates):
        assert after.hyper[0]["momentum"] == value.momentum


def test_a_schedule_that_remembers_its_calls_fails_the_law():
    calls = iter(range(100))
    with pytest.raises(
        AssertionError, match="must give the same rates backwards as forwards: 0: 5 against 0"
    ):
        check_schedule_is_a_function(lambda step: next(calls), 3)


def test_a_schedule_one_step_late_fails_the_law_of_torch():
    late = step_lr(0.1, step_size=3, gamma=0.5)
    with pytest.raises(AssertionError, match=r"at step 2 must be torch's 0\.05, but is 0\.1"):
        check_schedule_equals_torch(late, lambda o: lr_scheduler.StepLR(o, step_size=2, gamma=0.5), 9)


@given(lr=st.floats(0.0, 10.0), step=st.integers(0, 10**9))
def test_constant_is_constant(lr, step):
    assert constant(lr)(step) == lr


def test_a_rate_that_grows_beyond_every_number_is_infinite_as_torchs_is():
    """Python's power raises OverflowError where torch's product is inf; a rate of 0 stays 0."""
    assert step_lr(0.1, step_size=1, gamma=10.0)(400) == math.inf
    assert step_lr(0.0, step_size=1, gamma=10.0)(400) == 0.0


# --- any other torch scheduler --------------------------------------------------------------------------------------

OTHERS = {
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=20, power=2.0),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.9),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, milestones=[3, 7], gamma=0.5),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (t + 1)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.95),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=4, T_mult=2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=4),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.3, total_steps=30),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(o, 0.9), lr_scheduler.ConstantLR(o, 0.5)], optimizer=o
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[5]
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_from_torch_tabulates_what_torch_gives_without_a_warning(name):
    """To the bit, and pytest makes an error of any warning."""
    schedule = from_torch(OTHERS[name], 30, lr=0.2, momentum=0.9)
    expected = by_hand(OTHERS[name], 30, lr=0.2, momentum=0.9)
    values = [schedule(step) for step in range(30)]
    if name in {"CyclicLR", "OneCycleLR"}:
        assert values == [Rates(*pair) for pair in expected]
    else:
        assert values == [rate for rate, _ in expected]
    assert schedule(30) == schedule(10**6) == values[-1]
    assert repr(schedule) == f"Tabulated(scheduler='{name}', total_steps=30)"
    assert schedule.table == tuple(values)


def test_from_torch_of_a_single_step_never_steps_the_scheduler():
    assert from_torch(lambda o: lr_scheduler.LambdaLR(o, [1.0, None].__getitem__), 1, lr=0.5)(0) == 0.5


def test_from_torch_draws_no_random_number():
    before = torch.get_rng_state()
    from_torch(OTHERS["CyclicLR"], 10)
    assert torch.equal(before, torch.get_rng_state())


def test_from_torch_refuses_a_scheduler_that_follows_a_metric_and_points_to_plateau():
    with pytest.raises(ConfigError, match="got ReduceLROnPlateau, which follows a metric") as excinfo:
        from_torch(lr_scheduler.ReduceLROnPlateau, 10)
    assert "Use steploop.core.plateau.ReduceLROnPlateau" in str(excinfo.value)
    with pytest.raises(ConfigError, match=r"does not support `ReduceLROnPlateau`.*sequence\. Correct its"):
        from_torch(
            lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.ReduceLROnPlateau(o)], optimizer=o), 10
        )


def test_from_torch_refuses_what_is_no_scheduler():
    with pytest.raises(ConfigError, match=r"must return a torch\.optim\.lr_scheduler\.LRScheduler, got None"):
        from_torch(lambda o: None, 10)
    with pytest.raises(ConfigError, match="make_scheduler must be a function from an optimizer"):
        from_torch("StepLR", 10)


def test_from_torch_says_at_which_step_a_scheduler_failed():
    with pytest.raises(
        ConfigError, match=r"total_steps = 12 steps .* at step 11 it failed with ValueError"
    ) as excinfo:
        from_torch(lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=10), 12)
    assert "fewer total_steps" in str(excinfo.value)
    assert isinstance(excinfo.value.__cause__, ValueError)


@pytest.mark.parametrize("factor", [-1.0, math.nan, math.inf])
def test_from_torch_refuses_a_rate_that_no_optimizer_can_use(factor):
    with pytest.raises(ConfigError, match=r"finite learning rate >= 0 .* got Rates\(.*\) at step 2"):
        from_torch(lambda o: lr_scheduler.LambdaLR(o, lambda t: factor if t == 2 else 1.0), 4)


def test_from_torch_refuses_a_momentum_that_no_optimizer_can_use():
    for momentum in (1.0, 1.5):
        with pytest.raises(
            ConfigError, match=rf"a momentum in \[0, 1\) .* got Rates\(.*{momentum}\) at step 0"
        ):
            from_torch(lambda o, top=momentum: lr_scheduler.CyclicLR(o, 0.1, 0.2, max_momentum=top), 4)


# --- values, and what is refused ------------------------------------------------------------------------------------

LEGAL = {
    constant: {"lr": 0.1},
    step_lr: {"lr": 0.1, "step_size": 3, "gamma": 0.5},
    cosine_annealing: {"lr": 0.1, "total_steps": 10, "min_lr": 0.01},
    one_cycle: {"max_lr": 0.1, "total_steps": 10, "momentum": (0.85, 0.95)},
    warmup_cosine: {"lr": 0.1, "warmup_steps": 3, "total_steps": 10, "min_lr": 0.01},
    warmup_stable_decay: {
        "lr": 0.1,
        "warmup_steps": 3,
        "stable_steps": 4,
        "decay_steps": 3,
        "decay": "linear",
    },
    from_torch: {"make_scheduler": OTHERS["ExponentialLR"], "total_steps": 10, "lr": 0.1, "momentum": 0.9},
}


def make(factory, **changes):
    arguments = LEGAL[factory] | changes
    first = next(iter(arguments))
    return factory(arguments.pop(first), **arguments)


REAL = [-0.001, math.nan, math.inf, -math.inf, 10**400, "0.1", None, True, [0.1]]
COUNT = [0, -1, 1.0, 2.5, "3", None, True, math.nan]
COUNT_OR_NONE = [-1, 1.0, "3", None, True]
ILLEGAL = [
    (constant, "lr", REAL, "a finite number >= 0"),
    (step_lr, "lr", REAL, "a finite number >= 0"),
    (step_lr, "step_size", COUNT, "an integer >= 1"),
    (step_lr, "gamma", REAL, "a finite number >= 0"),
    (cosine_annealing, "lr", REAL, "a finite number >= 0"),
    (cosine_annealing, "total_steps", COUNT, "an integer >= 1"),
    (cosine_annealing, "min_lr", REAL, "a finite number >= 0"),
    (cosine_annealing, "min_lr", [0.2], "<= the highest rate (0.1)"),
    (one_cycle, "max_lr", REAL, "a finite number >= 0"),
    (one_cycle, "total_steps", COUNT, "an integer >= 1"),
    (one_cycle, "pct_start", [*REAL, 1.001, 30.0], "a finite number >= 0 and <= 1"),
    (one_cycle, "div_factor", [*REAL, 0.0], "a finite number > 0"),
    (one_cycle, "div_factor", [5e-324], "such that max_lr / div_factor is finite (max_lr is 0.1)"),
    (one_cycle, "final_div_factor", [*REAL, 0.0], "a finite number > 0"),
    (one_cycle, "final_div_factor", [5e-324], "such that the last rate is finite (the first is 0.004)"),
    (one_cycle, "anneal", ["cosine", "", None, 1], "one of 'cos', 'linear'"),
    (one_cycle, "rise", ["line", ["cos"], 1], "one of 'cos', 'linear'"),
    (
        one_cycle,
        "momentum",
        [
            0.9,
            (0.9,),
            (0.95, 0.85),
            (0.5, 1.0),
            (-0.1, 0.5),
            (math.nan, 0.5),
            ("0", "1"),
            (0.1, 0.2, 0.3),
            (),
            True,
        ],
        "None or two numbers (base, max) with 0 <= base <= max < 1",
    ),
    (one_cycle, "three_phase", [1, None, "yes"], "True or False"),
    (warmup_cosine, "lr", REAL, "a finite number >= 0"),
    (warmup_cosine, "warmup_steps", COUNT_OR_NONE, "an integer >= 0"),
    (warmup_cosine, "warmup_steps", [11], "<= total_steps (10)"),
    (warmup_cosine, "total_steps", COUNT, "an integer >= 1"),
    (warmup_cosine, "min_lr", REAL, "a finite number >= 0"),
    (warmup_cosine, "min_lr", [0.2], "<= the highest rate (0.1)"),
    (warmup_stable_decay, "lr", REAL, "a finite number >= 0"),
    (warmup_stable_decay, "warmup_steps", COUNT_OR_NONE, "an integer >= 0"),
    (warmup_stable_decay, "stable_steps", COUNT_OR_NONE, "an integer >= 0"),
    (warmup_stable_decay, "decay_steps", COUNT_OR_NONE, "an integer >= 0"),
    (warmup_stable_decay, "min_lr", REAL, "a finite number >= 0"),
    (warmup_stable_decay, "min_lr", [0.2], "<= the highest rate (0.1)"),
    (warmup_stable_decay, "decay", ["exp", None], "one of 'linear', 'cos', 'sqrt'"),
    (from_torch, "total_steps", COUNT, "an integer >= 1"),
    (from_torch, "lr", [value for value in REAL if value != [0.1]], "a finite number >= 0"),
    (from_torch, "momentum", [*REAL, 1.0], "a finite number >= 0 and < 1"),
]


@pytest.mark.parametrize(
    ("factory", "name", "value", "expected"),
    [(factory, name, value, text) for factory, name, values, text in ILLEGAL for value in values],
)
def test_an_illegal_hyperparameter_is_refused_by_its_name(factory, name, value, expected):
    """Which one, what was expected, what came, and a last sentence that says what to do."""
    with pytest.raises(ConfigError) as excinfo:
        make(factory, **{name: value})
    message = str(excinfo.value)
    owner = "from_torch" if factory is from_torch else type(make(factory)).__name__
    assert message.startswith(f"{owner}: {name} must be {expected}, got {value!r}. ")
    assert message.endswith(".")
    assert len(message.rsplit(", got ", 1)[1]) > len(repr(value)) + 10


@pytest.mark.parametrize("factory", LEGAL)
def test_a_schedule_is_a_frozen_value_that_prints_readably(factory):
    schedule = make(factory)
    assert schedule == make(factory)
    assert hash(schedule) == hash(make(factory))
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        schedule.lr = 1.0
    assert repr(schedule).startswith(type(schedule).__name__ + "(")
    assert "_phases" not in repr(schedule)


def test_the_defaults_are_torchs_where_torch_has_one():
    assert step_lr(0.1, step_size=3).gamma == 0.1
    assert cosine_annealing(0.1, total_steps=3).min_lr == 0.0
    assert warmup_cosine(0.1, warmup_steps=1, total_steps=3).min_lr == 0.0
    warm = warmup_stable_decay(0.1, warmup_steps=1, stable_steps=1, decay_steps=1)
    assert (warm.min_lr, warm.decay) == (0.0, "linear")
    cycle = one_cycle(0.1, total_steps=3)
    assert (cycle.pct_start, cycle.div_factor, cycle.final_div_factor) == (0.3, 25.0, 1e4)
    assert (cycle.anneal, cycle.rise, cycle.momentum, cycle.three_phase) == ("cos", "cos", None, False)
    assert one_cycle(0.1, total_steps=3, anneal="linear").rise == "linear"
    scheduler = from_torch(lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.2, cycle_momentum=False), 1)
    assert scheduler(0) == 0.1


def test_bounds_of_the_legal_ranges_are_legal():
    assert constant(0)(5) == 0.0
    assert isinstance(constant(1)(0), float)
    assert step_lr(0.1, step_size=1, gamma=0)(1) == 0.0
    assert cosine_annealing(0.1, total_steps=1, min_lr=0.1)(0) == 0.1
    assert one_cycle(0.1, total_steps=4, pct_start=1)(3) == 0.1
    assert one_cycle(0.1, total_steps=4, pct_start=0, momentum=[0.5, 0.5])(2).momentum == 0.5
    assert one_cycle(0.1, total_steps=4, momentum=(0.0, 0.5))(0).momentum == 0.5
    assert from_torch(OTHERS["LambdaLR"], 1, lr=0, momentum=0)(0) == 0.0


def test_numbers_of_numpy_are_taken_as_plain_ones():
    numpy = pytest.importorskip("numpy")
    schedule = step_lr(numpy.float32(0.5), step_size=numpy.int64(2))
    assert type(schedule.lr) is float
    assert type(schedule.step_size) is int
