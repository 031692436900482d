"""Early stopping: a pure fold over a metric, which stops at the patience-th check in a row without improvement."""

import math
from functools import reduce

import attrs
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from steploop.core.early_stopping import Best, EarlyStopping, StoppingState, is_better, keep_best
from steploop.errors import ConfigError
from steploop.testing import (
    check_best_is_the_running_best,
    check_max_is_min_of_the_negative,
    check_metric_fold_splits,
    check_more_min_delta_never_stops_later,
    check_more_patience_never_stops_earlier,
    check_stops_at_the_patience_th_bad_check,
    stop_check,
    strategies,
)

metrics = st.floats(-3, 3) | st.integers(-3, 3).map(float) | st.sampled_from([math.nan, math.inf, -math.inf])
histories = strategies.histories()
early_stoppings = strategies.early_stoppings()
patiences = st.integers(1, 6)
modes = st.sampled_from(["min", "max"])


def run(early, history):
    return reduce(early.update, history, early.init())


# --- law 10 ---------------------------------------------------------------------------------------------------------


@given(early=early_stoppings, history=histories)
def test_it_stops_at_the_patience_th_bad_check_in_a_row_and_never_before(early, history):
    check_stops_at_the_patience_th_bad_check(early, history)


@given(early=early_stoppings, history=histories)
def test_best_is_the_running_best_and_never_nan(early, history):
    check_best_is_the_running_best(early, history)


@given(early=early_stoppings, history=histories, more=st.integers(0, 5))
def test_more_patience_never_stops_earlier(early, history, more):
    check_more_patience_never_stops_earlier(early, history, more)


@given(early=early_stoppings, history=histories, more=st.sampled_from([0.0, 0.1, 0.5]) | st.floats(0, 5))
@example(early=EarlyStopping(patience=2, min_delta=0.5), history=[10.0, 9.3, 8.9, 8.9, 8.9], more=0.5)
def test_more_min_delta_never_stops_later(early, history, more):
    """The example breaks it where the value to beat is the last one that counted, as in Lightning and Keras."""
    check_more_min_delta_never_stops_later(early, history, more)


@given(early=early_stoppings, history=histories)
def test_max_of_a_metric_is_min_of_its_negative(early, history):
    check_max_is_min_of_the_negative(early, history)


@given(early=early_stoppings, history=histories, data=st.data())
def test_splitting_the_history_and_resuming_changes_nothing(early, history, data):
    check_metric_fold_splits(early, history, data.draw(strategies.cuts(len(history))))


@attrs.frozen(kw_only=True)
class Wrong(EarlyStopping):
    """A nan counts as an improvement, the first value stays the best, and patience is exceeded rather than reached."""

    def update(self, state, metric):
        bad = 0 if math.isnan(metric) or state.best is None else state.bad_checks + 1
        best = metric if state.best is None else state.best
        return StoppingState(best=best, bad_checks=bad, stopped=bad > self.patience)


@pytest.mark.parametrize(
    ("law", "history", "message"),
    [
        (check_stops_at_the_patience_th_bad_check, [1.0] * 5, "must stop at check 3, but stopped at 4"),
        (check_best_is_the_running_best, [2.0, math.nan, 1.0], "must be 1.0, but is 2.0"),
        (
            lambda e, h: check_more_patience_never_stops_earlier(e, h, -1),
            [1.0] * 5,
            "more patience must not stop earlier",
        ),
    ],
)
def test_a_wrong_early_stopping_fails_its_law(law, history, message):
    with pytest.raises(AssertionError, match=message):
        law(Wrong(patience=2), history)


@given(history=histories, patience=patiences, mode=modes)
def test_update_leaves_the_state_before_it_as_it_was(history, patience, mode):
    early = EarlyStopping(patience=patience, mode=mode)
    state = run(early, history)
    copy = attrs.evolve(state)
    assert early.update(state, 0.5) == early.update(state, 0.5)
    assert state == copy


NAN = math.nan


@pytest.mark.parametrize(
    ("history", "min_delta", "expected"),
    [
        ([1.0] * 9, 0.0, 3),
        ([3.0] + [2.0] * 8, 0.0, 4),
        ([1.0] + [NAN] * 8, 0.0, 3),
        ([NAN, 5.0, 4.0, 3.0, 2.0], 0.0, math.inf),
        ([NAN] * 5, 0.0, 2),
        ([1.0, 0.5, 0.0, -0.5, -1.0], 0.5, 3),  # strict: exactly min_delta better is not better
        ([1.0, 0.4, -0.2, -0.8], 0.5, math.inf),
        ([math.inf, math.inf, 5.0, 4.0, 3.0], 0.0, math.inf),
        ([math.inf] * 5, 0.0, 3),  # a first value that is infinite is a baseline too
        ([1.0, -math.inf, -5.0, -6.0, -7.0], 0.0, 4),  # -inf is the least there is: nothing beats it
    ],
)
def test_the_table_of_what_libraries_agree_on(history, min_delta, expected):
    """Patience 2: the first value is the baseline, equal is not better, NaN is never better and never best."""
    early = EarlyStopping(patience=2, min_delta=min_delta)
    assert stop_check(early, history) == expected
    assert stop_check(attrs.evolve(early, mode="max"), [-value for value in history]) == expected


def test_once_stopped_it_stays_stopped_and_still_knows_the_best():
    early = EarlyStopping(patience=1)
    state = run(early, [1.0, 1.0])
    assert state == StoppingState(best=1.0, bad_checks=1, stopped=True)
    assert early.update(state, 0.5) == StoppingState(best=0.5, bad_checks=0, stopped=True)


def test_the_first_state_is_empty_and_the_metric_becomes_a_plain_number():
    numpy = pytest.importorskip("numpy")
    assert EarlyStopping().init() == StoppingState(best=None, bad_checks=0, stopped=False)
    state = EarlyStopping().update(StoppingState(), numpy.float32(0.5))
    assert type(state.best) is float


@given(value=metrics, best=st.none() | metrics.filter(lambda v: v == v), mode=modes)
def test_better_is_strict_and_nan_is_never_better(value, best, mode):
    better = is_better(value, best, mode)
    if math.isnan(value):
        assert not better
    elif best is None:
        assert better
    else:
        assert better == (value < best if mode == "min" else value > best)


@given(history=histories, mode=modes)
def test_the_best_one_kept_is_the_first_of_the_best_and_knows_its_step(history, mode):
    kept = None
    for step, value in enumerate(history):
        kept = keep_best(kept, value, step=step, epoch=step // 3, mode=mode)
    numbers = [value for value in history if not math.isnan(value)]
    if not numbers:
        assert kept is None
    else:
        value = (min if mode == "min" else max)(numbers)
        step = next(step for step, other in enumerate(history) if other == value)
        assert kept == Best(value=value, step=step, epoch=step // 3)


def test_less_is_better_and_the_epoch_is_the_first_unless_said_otherwise():
    first = keep_best(None, 2.0, step=5)
    assert first == Best(value=2.0, step=5, epoch=0)
    assert keep_best(first, 3.0, step=6) is first
    assert EarlyStopping() == EarlyStopping(patience=10, min_delta=0.0, mode="min", monitor="loss")


NOT_REAL = [math.nan, "1", None, True]
NOT_COUNT = [-1, 1.0, "1", None, True]


@pytest.mark.parametrize(
    ("kind", "name", "value", "expected"),
    [
        (kind, name, value, expected)
        for kind, name, values, expected in [
            (EarlyStopping, "patience", [0, *NOT_COUNT], "an integer >= 1"),
            (EarlyStopping, "min_delta", [-1e-9, math.inf, *NOT_REAL], "a finite number >= 0"),
            (EarlyStopping, "mode", ["minimum", None, 1], "one of 'min', 'max'"),
            (EarlyStopping, "monitor", ["", None, 3], "the name of a metric"),
            (StoppingState, "best", [math.nan, "1", True], "a number, not NaN"),
            (StoppingState, "bad_checks", NOT_COUNT, "an integer >= 0"),
            (StoppingState, "stopped", [1, None], "True or False"),
            (Best, "value", NOT_REAL, "a number, not NaN"),
            (Best, "step", NOT_COUNT, "an integer >= 0"),
            (Best, "epoch", NOT_COUNT, "an integer >= 0"),
        ]
        for value in values
    ],
)
def test_an_illegal_value_is_refused_by_its_name(kind, name, value, expected):
    legal = {"value": 1.0, "step": 3} if kind is Best else {}
    with pytest.raises(ConfigError) as excinfo:
        kind(**(legal | {name: value}))
    assert str(excinfo.value).startswith(f"{kind.__name__}: {name} must be {expected}, got {value!r}. ")
    assert str(excinfo.value).endswith(".")


def test_an_unknown_mode_is_refused_before_any_comparison():
    for best in (None, 1.0):
        with pytest.raises(ConfigError, match='mode must be "min" or "max", got \'least\''):
            is_better(0.5, best, "least")
