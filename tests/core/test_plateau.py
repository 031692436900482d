"""The plateau is torch's ReduceLROnPlateau as a fold: bit-equal for every history."""

import math
from functools import reduce

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steploop.core.plateau import PlateauState, ReduceLROnPlateau
from steploop.errors import ConfigError
from steploop.testing import check_metric_fold_splits, check_plateau_equals_torch, strategies
from steploop.testing.strategies import plateaus

metrics = st.floats() | st.floats(-3, 3) | st.integers(-3, 3).map(float)
histories = st.lists(metrics, max_size=40)


def torchs(plateau):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=plateau.lr)
    options = {key: value for key, value in attrs.asdict(plateau).items() if key != "lr"}
    return optimizer, torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, **options)


@given(plateau=plateaus(), history=histories)
def test_plateau_equals_torch_after_every_check(plateau, history):
    check_plateau_equals_torch(plateau, history)


@given(plateau=plateaus(), history=histories, data=st.data())
def test_splitting_the_history_and_resuming_changes_nothing(plateau, history, data):
    check_metric_fold_splits(plateau, history, data.draw(strategies.cuts(len(history))))


def test_a_plateau_that_acts_one_check_early_fails_the_law():
    @attrs.frozen(kw_only=True)
    class Hasty(ReduceLROnPlateau):
        def update(self, state, metric):
            return attrs.evolve(
                ReduceLROnPlateau.update(self, state, metric), learning_rate=state.learning_rate / 2
            )

    with pytest.raises(AssertionError, match=r"after check 0 .* must be torch's \(1\.0, .*, but are \(0\.5"):
        check_plateau_equals_torch(Hasty(lr=1.0), [1.0])


@given(plateau=plateaus(), history=histories)
def test_the_rate_is_never_raised_and_never_below_its_floor(plateau, history):
    state = plateau.init()
    for metric in history:
        after = plateau.update(state, metric)
        assert plateau.min_lr <= after.learning_rate <= state.learning_rate
        state = after


def test_it_acts_on_the_check_after_patience_bad_ones():
    """One later than early stopping, as in torch: a baseline, then patience + 1 checks that are no better."""
    plateau = ReduceLROnPlateau(lr=1.0, patience=2, factor=0.5)
    assert reduce(plateau.update, [1.0] * 3, plateau.init()).learning_rate == 1.0
    assert reduce(plateau.update, [1.0] * 4, plateau.init()).learning_rate == 0.5


def test_the_defaults_are_torchs():
    ours = ReduceLROnPlateau(lr=0.5)
    _, scheduler = torchs(ours)
    default = torch.optim.lr_scheduler.ReduceLROnPlateau(scheduler.optimizer)
    for name in ("mode", "factor", "patience", "threshold", "threshold_mode", "cooldown", "eps"):
        assert getattr(ours, name) == getattr(default, name)
    assert [ours.min_lr] == default.min_lrs
    assert ours.init() == PlateauState(learning_rate=0.5, best=None, bad_checks=0, cooldown_left=0)


@pytest.mark.parametrize(
    ("options", "history", "best", "rate"),
    [
        ({"threshold": 0.25}, [4.0, 3.0], 4.0, 0.5),  # a quarter less is the bound itself
        ({"threshold": 0.25}, [4.0, 2.9], 2.9, 1.0),
        ({"threshold": 0.25}, [4.0, 3.5, 2.9], 2.9, 0.5),
        ({"threshold": 0.25, "mode": "max"}, [4.0, 5.0], 4.0, 0.5),
        ({"threshold": 0.25, "mode": "max"}, [4.0, 5.1], 5.1, 1.0),
        ({"threshold": 0.25, "threshold_mode": "abs"}, [4.0, 3.75], 4.0, 0.5),
        ({"threshold": 0.25, "threshold_mode": "abs"}, [4.0, 3.7], 3.7, 1.0),
        ({"threshold": 0.25, "threshold_mode": "abs", "mode": "max"}, [4.0, 4.25], 4.0, 0.5),
        ({"threshold": 0.25, "threshold_mode": "abs", "mode": "max"}, [4.0, 4.3], 4.3, 1.0),
        ({"eps": 0.5}, [4.0, 4.0], 4.0, 1.0),  # a change of eps itself is not made
        ({"eps": 0.6}, [4.0, 4.0], 4.0, 1.0),
        ({"eps": 0.4}, [4.0, 4.0], 4.0, 0.5),
        ({"min_lr": 0.75}, [4.0, 4.0], 4.0, 0.75),
        ({"cooldown": 2}, [4.0, 4.0, 4.0, 4.0], 4.0, 0.5),
        ({"cooldown": 2}, [4.0, 4.0, 4.0, 4.0, 4.0], 4.0, 0.25),
        ({"patience": 1}, [4.0, 4.0, 3.0, 3.0, 3.0], 3.0, 0.5),
    ],
)
def test_the_bounds_are_where_torch_has_them(options, history, best, rate):
    plateau = ReduceLROnPlateau(**({"lr": 1.0, "factor": 0.5, "patience": 0} | options))
    check_plateau_equals_torch(plateau, history)
    state = reduce(plateau.update, history, plateau.init())
    assert (state.best, state.learning_rate) == (best, rate)


NOT_REAL = [-1e-9, math.nan, math.inf, "1", None, True]
NOT_COUNT = [-1, 1.0, "1", None, True]


@pytest.mark.parametrize(
    ("kind", "name", "value", "expected"),
    [
        (kind, name, value, expected)
        for kind, name, values, expected in [
            (ReduceLROnPlateau, "lr", NOT_REAL, "a finite number >= 0"),
            (ReduceLROnPlateau, "mode", ["lowest", None], "one of 'min', 'max'"),
            (ReduceLROnPlateau, "factor", [*NOT_REAL, 1.0], "a finite number >= 0 and < 1"),
            (ReduceLROnPlateau, "patience", NOT_COUNT, "an integer >= 0"),
            (ReduceLROnPlateau, "threshold", NOT_REAL, "a finite number >= 0"),
            (ReduceLROnPlateau, "threshold", [1.0], 'below 1 where threshold_mode is "rel"'),
            (ReduceLROnPlateau, "threshold_mode", ["relative"], "one of 'rel', 'abs'"),
            (ReduceLROnPlateau, "cooldown", NOT_COUNT, "an integer >= 0"),
            (ReduceLROnPlateau, "min_lr", NOT_REAL, "a finite number >= 0"),
            (ReduceLROnPlateau, "min_lr", [0.6], "<= lr (0.5)"),
            (ReduceLROnPlateau, "eps", NOT_REAL, "a finite number >= 0"),
            (PlateauState, "learning_rate", NOT_REAL, "a finite number >= 0"),
            (PlateauState, "best", [math.nan, "1"], "a number, not NaN"),
            (PlateauState, "bad_checks", NOT_COUNT, "an integer >= 0"),
            (PlateauState, "cooldown_left", NOT_COUNT, "an integer >= 0"),
        ]
        for value in values
    ],
)
def test_an_illegal_value_is_refused_by_its_name(kind, name, value, expected):
    legal = {"learning_rate": 0.5} if kind is PlateauState else {"lr": 0.5}
    with pytest.raises(ConfigError) as excinfo:
        kind(**(legal | {name: value}))
    assert str(excinfo.value).startswith(f"{kind.__name__}: {name} must be {expected}, got {value!r}. ")
    assert str(excinfo.value).endswith(".")


def test_an_absolute_threshold_may_be_one_or_more():
    plateau = ReduceLROnPlateau(lr=0.5, patience=0, threshold=2.0, threshold_mode="abs")
    assert reduce(plateau.update, [5.0, 2.5], plateau.init()).best == 2.5
    assert reduce(plateau.update, [5.0, 3.0], plateau.init()).best == 5.0
