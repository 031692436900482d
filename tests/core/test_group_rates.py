"""Rates: one schedule for each group, ends that are absolute, and no door through which a rate comes that is none."""

import math
from fractions import Fraction

import attrs
import numpy as np
import pytest
import torch
from state_helpers import with_flight
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, OneCycleLR, StepLR

from steploop import (
    Optimizer,
    Rates,
    TrainState,
    checkpoint,
    constant,
    cosine_annealing,
    from_torch,
    one_cycle,
    schedule,
    step_lr,
    warmup_cosine,
    warmup_stable_decay,
)
from steploop.core.steps.set_rates import set_rates
from steploop.errors import ConfigError

GROUPS = [("1.*", {"lr": 0.02}), (["2.weight"], {"lr": 0.3})]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1))


def grouped(torch_class=torch.optim.SGD, groups=GROUPS, **options):
    given = {"momentum": 0.9} if torch_class is torch.optim.SGD else {}
    return TrainState.create(network(), Optimizer(torch_class, lr=0.1, groups=groups, **(given | options)))


def rates(state):
    return [group["lr"] for group in state.hyper]


def after(state, steps):
    return state.replace(applied_steps=steps)


# -- one schedule for each group ------------------------------------------------------------------------------------


def test_a_group_is_named_by_its_selector_or_its_index_and_its_values_are_absolute():
    state = schedule(after(grouped(), 3), {"1.*": lambda t: 1.0 * t, 2: lambda t: 0.5 * t})
    assert rates(state) == [0.1, 3.0, 1.5]
    assert rates(schedule(after(grouped(), 3), {0: step_lr(0.1, step_size=2)})) == [
        pytest.approx(0.01),
        0.02,
        0.3,
    ]


def test_an_empty_mapping_leaves_every_rate_and_a_second_call_changes_nothing():
    state = grouped()
    assert schedule(state, {}).hyper == state.hyper
    several = {"1.*": lambda t: 0.7, 0: lambda t: 0.2}
    once = schedule(state, several)
    assert schedule(once, several).hyper == once.hyper
    assert [{k: v for k, v in g.items() if k != "lr"} for g in once.hyper] == [
        {k: v for k, v in g.items() if k != "lr"} for g in state.hyper
    ]


def test_a_selector_that_no_decay_splits_names_both_of_its_groups():
    state = grouped(torch.optim.AdamW, groups=[("1.*", {"lr": 0.02})], no_decay=True, weight_decay=0.1)
    assert [names for names in state.machine.group_names if names[0].startswith("1.")] == [
        ("1.weight",),
        ("1.bias",),
    ]
    scheduled = schedule(state, {"1.*": lambda t: 0.5})
    assert [
        r for names, r in zip(state.machine.group_names, rates(scheduled), strict=True) if "1." in names[0]
    ] == [0.5] * 2


def test_schedules_of_two_groups_may_cycle_the_momentum_of_one():
    cycle = one_cycle(0.5, total_steps=10, momentum=(0.8, 0.95))
    state = schedule(after(grouped(), 2), {1: cycle, 0: constant(0.3)})
    assert rates(state) == [0.3, pytest.approx(0.5), 0.3]
    assert [group["momentum"] for group in state.hyper] == [0.9, pytest.approx(0.8), 0.9]


@pytest.mark.parametrize(
    ("named", "says"),
    [
        ("2.*", "there is no parameter group '2.*'. There are 3 groups, 0 to 2, and the selectors '1.*'."),
        (3, "there is no parameter group 3. There are 3 groups, 0 to 2, and the selectors '1.*'."),
        (-1, "there is no parameter group -1. There are 3 groups, 0 to 2, and the selectors '1.*'."),
    ],
)
def test_a_group_that_there_is_not_is_refused_with_those_there_are(named, says):
    with pytest.raises(ConfigError) as caught:
        schedule(grouped(), {named: constant(0.1)})
    assert str(caught.value) == f"schedule: {says}"


def test_a_group_without_a_name_is_told_by_its_index():
    state = TrainState.create(network(), Optimizer(torch.optim.SGD, lr=0.1))
    with pytest.raises(ConfigError) as caught:
        schedule(state, {"1.*": constant(0.1)})
    assert str(caught.value) == "schedule: there is no parameter group '1.*'. There are 1 groups, 0 to 0."


def test_a_second_set_of_schedules_takes_the_place_of_the_first():
    state, first, second = grouped(), {0: constant(0.5)}, {0: constant(0.25), 1: constant(0.125)}
    for several, expected in (
        (first, [0.5, 0.02, 0.3]),
        (second, [0.25, 0.125, 0.3]),
        (first, [0.5, 0.02, 0.3]),
    ):
        assert rates(schedule(state, several)) == expected
    assert rates(schedule(state, step_lr(0.2, step_size=9))) == pytest.approx([0.2, 0.04, 0.6])


def test_a_rate_in_a_tensor_on_a_device_stays_there():
    rate = schedule(grouped(groups=()), lambda t: torch.ones(1, device="meta")).hyper[0]["lr"]
    assert (rate.device.type, rate.shape) == ("meta", ())


def test_rates_of_each_group_are_looked_up_on_a_device_by_the_same_numbers():
    """Where the count of steps is a tensor that nobody may read; a group that is not named keeps what it has."""
    several = {"1.*": lambda t: 2.0**-t, 2: lambda t: Rates(0.25 * (1 + t), 0.5)}
    host = schedule(after(grouped(), 5), several)
    device = with_flight(grouped(), known=(4, 4)).replace(applied_steps=torch.tensor(5), attempted_steps=6)
    device = schedule(device, several)
    assert [type(rate) for rate in rates(device)] == [float, torch.Tensor, torch.Tensor]
    assert [float(rate) for rate in rates(device)] == rates(host)
    assert [float(group["momentum"]) for group in device.hyper] == [group["momentum"] for group in host.hyper]


def test_rate_and_momentum_of_one_function_go_to_every_group_the_rate_in_proportion():
    state = schedule(after(grouped(), 2), lambda t: Rates(0.1 * t, 0.25 * t))
    assert rates(state) == pytest.approx([0.2, 0.04, 0.6])
    assert [group["momentum"] for group in state.hyper] == [0.5] * 3


def test_one_rate_for_all_is_set_in_the_proportion_of_the_groups():
    state = set_rates(grouped(), 0.5)
    assert rates(state) == pytest.approx([0.5, 0.1, 1.5])
    assert rates(state)[0] == 0.5
    assert [group["momentum"] for group in state.hyper] == [0.9] * 3
    assert [group["momentum"] for group in set_rates(grouped(), 1, 0.7).hyper] == [0.7] * 3
    assert type(rates(set_rates(grouped(groups=()), 1))[0]) is int


def test_a_group_that_there_is_not_is_refused_with_every_selector_once():
    groups = [("1.*", {"lr": 0.02}), ("2.*", {"lr": 0.3})]
    state = grouped(torch.optim.AdamW, groups=groups, no_decay=True, weight_decay=0.1)
    with pytest.raises(ConfigError) as caught:
        schedule(state, {"3.*": constant(0.1)})
    assert str(caught.value) == (
        "schedule: there is no parameter group '3.*'. There are 6 groups, 0 to 5, and the selectors '1.*', '2.*'."
    )


# -- ends that are absolute -----------------------------------------------------------------------------------------


def by_torch(make, steps, lrs=(0.1, 0.02, 0.3)):
    """What torch's own scheduler gives each group after each step."""
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs]
    optimizer = torch.optim.SGD(groups, lr=lrs[0], momentum=0.9)
    scheduler = make(optimizer)
    rows = []
    for _ in range(steps):
        rows.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return rows


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (cosine_annealing(0.1, total_steps=8, min_lr=0.01), lambda o: CosineAnnealingLR(o, 8, eta_min=0.01)),
        (cosine_annealing(0.1, total_steps=8), lambda o: CosineAnnealingLR(o, 8)),
        (one_cycle(0.4, total_steps=8), lambda o: OneCycleLR(o, 0.4, total_steps=8)),
        (step_lr(0.1, step_size=3, gamma=0.5), lambda o: StepLR(o, 3, gamma=0.5)),
    ],
    ids=["cosine with min_lr", "cosine", "one cycle", "steps"],
)
def test_a_group_has_torchs_rate_of_its_own_base_and_the_ends_that_are_named(ours, theirs):
    for step, expected in enumerate(by_torch(theirs, 8)):
        assert rates(schedule(after(grouped(), step), ours)) == pytest.approx(expected, rel=1e-9), step


@pytest.mark.parametrize(
    "ours",
    [
        warmup_cosine(0.1, warmup_steps=2, total_steps=10, min_lr=0.005),
        warmup_stable_decay(0.1, warmup_steps=2, stable_steps=3, decay_steps=4, min_lr=0.005),
    ],
    ids=lambda f: type(f).__name__,
)
def test_a_warmup_is_in_proportion_and_its_lowest_rate_is_the_same_in_every_group(ours):
    peak = schedule(after(grouped(), 2), ours)
    assert rates(peak) == pytest.approx([0.1, 0.02, 0.3])
    assert rates(schedule(after(grouped(), 100), ours)) == pytest.approx([0.005] * 3)
    warming = schedule(after(grouped(), 1), ours)
    assert rates(warming) == pytest.approx([r * rates(warming)[0] / 0.1 for r in (0.1, 0.02, 0.3)])


@pytest.mark.parametrize(
    ("make", "takes_a_list"),
    [
        (lambda o: OneCycleLR(o, max_lr=0.4, total_steps=8), False),
        (lambda o: OneCycleLR(o, max_lr=[0.4, 0.1, 0.7], total_steps=8), True),
        (lambda o: LambdaLR(o, [lambda t: 0.9**t, lambda t: 1.0, lambda t: 1 / (1 + t)]), True),
        (lambda o: CosineAnnealingLR(o, 5, eta_min=0.03), False),
        (lambda o: LinearLR(o, 0.1, total_iters=4), False),
    ],
    ids=["one peak", "a list of peaks", "a list of lambdas", "eta_min", "linear"],
)
@pytest.mark.parametrize("lr", [[0.1, 0.02, 0.3], None], ids=["rates given", "rates in proportion"])
def test_from_torch_gives_every_group_what_torch_gives_it(make, takes_a_list, lr):
    given = {"lr": 0.1 if lr is None else lr}
    if lr is None and takes_a_list:
        with pytest.raises(ConfigError, match="give lr a list with the rate of each group"):
            from_torch(make, 8, **given)
        return
    ours = from_torch(make, 8, **given)
    for step, expected in enumerate(by_torch(make, 8)):
        assert rates(schedule(after(grouped(), step), ours)) == pytest.approx(expected, rel=1e-9), step
    beyond = schedule(after(grouped(), 50), ours)
    assert rates(beyond) == pytest.approx(by_torch(make, 8)[-1], rel=1e-9)


@pytest.mark.parametrize("groups", [(), GROUPS[:1]], ids=["one", "two"])
def test_a_table_with_the_rates_of_another_number_of_groups_is_refused(groups):
    table = from_torch(lambda o: CosineAnnealingLR(o, 8), 8, lr=[0.1, 0.02, 0.3])
    with pytest.raises(ConfigError) as caught:
        schedule(grouped(groups=groups), table)
    assert str(caught.value) == (
        f"from_torch: lr has the rates of 3 parameter groups, but the optimizer has {len(groups) + 1}. Give one for each of its "
        "groups, or a single one, which every group takes in proportion."
    )


# -- every door -------------------------------------------------------------------------------------------------------

NO_RATES = [-0.5, -1e-30, math.nan, math.inf, -math.inf]


def refused(call, says):
    with pytest.raises(ConfigError) as caught:
        call()
    assert says in str(caught.value), str(caught.value)


@pytest.mark.parametrize("rate", NO_RATES)
def test_a_rate_that_is_none_is_refused_at_every_door(rate):
    must = f"must be a finite number >= 0, but is {rate!r}."
    by_torch_itself = f"Invalid learning rate: {rate}" if rate < 0 else must
    of_adam = by_torch_itself if rate == rate else "Adam refuses this: Invalid learning rate: nan"
    made = grouped()
    refused(lambda: TrainState.create(network(), Optimizer(torch.optim.SGD, lr=rate)), by_torch_itself)
    refused(lambda: TrainState.create(network(), Optimizer(torch.optim.Adam, lr=rate)), of_adam)
    refused(lambda: grouped(groups=[("1.*", {"lr": rate})]), f"lr {must}")
    refused(
        lambda: TrainState.create(
            network(),
            Optimizer(torch.optim.SGD, lr=0.1, groups=[("1.*", Optimizer(torch.optim.Adam, lr=rate))]),
        ),
        of_adam,
    )
    refused(lambda: schedule(made, lambda t: rate), f"schedule: the learning rate {must}")
    refused(lambda: schedule(made, lambda t: Rates(rate, 0.9)), f"schedule: the learning rate {must}")
    refused(lambda: schedule(made, {"1.*": lambda t: rate}), f"schedule: the learning rate {must}")
    device = with_flight(made, known=(0, 0)).replace(applied_steps=torch.tensor(0))
    refused(lambda: schedule(device, lambda t: rate if t == 9 else 0.1), must)
    hyper = tuple({**group, "lr": rate} if i == 1 else group for i, group in enumerate(made.hyper))
    refused(lambda: attrs.evolve(made, hyper=hyper), f"TrainState: the lr of parameter group 1 {must}")
    assert rates(made) == [0.1, 0.02, 0.3]


@pytest.mark.parametrize("rate", [None, "0.1", True, 1j, [0.1], torch.tensor([0.1, 0.2])], ids=str)
def test_what_is_no_number_is_refused_as_a_rate(rate):
    refused(
        lambda: schedule(grouped(), lambda t: rate),
        f"schedule: the learning rate must be a finite number >= 0, but is {rate!r}.",
    )


@pytest.mark.parametrize("rate", [-1.0, math.nan, math.inf])
def test_a_rate_in_a_tensor_or_of_numpy_is_checked_too(rate):
    for one in (torch.tensor(rate), np.float32(rate), np.float64(rate)):
        must = f"must be a finite number >= 0, but is {one!r}."
        refused(lambda one=one: schedule(grouped(), lambda t: one), f"schedule: the learning rate {must}")
    made = grouped()
    hyper = tuple({**group, "lr": torch.tensor(rate)} for group in made.hyper)
    refused(lambda: attrs.evolve(made, hyper=hyper), "TrainState: the lr of parameter group 0 must be")
    with pytest.raises(ConfigError, match=r"finite number >= 0|Invalid learning rate"):
        grouped(groups=[("1.*", {"lr": torch.tensor(rate)})])


@pytest.mark.parametrize("rate", [np.float32(0.25), np.float64(0.25), torch.tensor(0.25), Fraction(1, 4)])
def test_a_number_of_another_kind_becomes_pythons(rate, tmp_path):
    """A checkpoint holds no others, and an hour later is too late to say so."""
    state = schedule(grouped(), lambda t: rate)
    assert rates(state) == pytest.approx([0.25, 0.05, 0.75], rel=1e-12)
    assert {type(r) for r in rates(state)} == {float}
    checkpoint.save(state, tmp_path / "a")
    described = Optimizer(
        torch.optim.Adam,
        lr=np.float32(0.25),
        betas=(np.float64(0.5), np.float32(0.75)),
        groups=[("1.*", {"eps": np.float16(0.5)})],
    )
    assert (
        TrainState.create(network(), described).hyper[1] | {"lr": 0.25, "betas": (0.5, 0.75), "eps": 0.5}
        == TrainState.create(network(), described).hyper[1]
    )
    assert {type(v) for v in (*described.hyperparameters["betas"], described.hyperparameters["lr"])} == {
        float
    }


def test_a_hyperparameter_that_no_checkpoint_holds_is_refused_when_the_state_is_made():
    with pytest.raises(
        ConfigError, match=r"^SGD keeps a ndarray \('momentum' of group 0\), which a state cannot hold"
    ):
        TrainState.create(network(), Optimizer(torch.optim.SGD, lr=0.1, momentum=np.array(0.9)))


@pytest.mark.parametrize("momentum", [-0.1, 1.0, 1.5, math.nan])
def test_a_momentum_that_is_none_is_refused(momentum):
    refused(
        lambda: schedule(grouped(), lambda t: Rates(0.1, momentum)),
        f"schedule: the momentum must lie in [0, 1), but is {momentum!r}.",
    )
    assert schedule(grouped(), lambda t: Rates(0.1, 0.0)).hyper[0]["momentum"] == 0.0


@pytest.mark.parametrize("rate", [0, 0.0, 1, 1e-300, 1e30])
def test_a_rate_that_is_one_is_taken_as_it_is(rate):
    (taken,) = rates(schedule(grouped(groups=()), lambda t: rate))
    assert (taken, type(taken)) == (rate, type(rate))
    assert (
        attrs.evolve(grouped(), hyper=tuple({**g, "lr": rate} for g in grouped().hyper)).learning_rate == rate
    )
