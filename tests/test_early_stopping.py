"""Early stopping: a pure fold over a metric, which stops at the patience-th check in a row without improvement."""

import json
import math
from functools import reduce
from itertools import accumulate

import attrs
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from steploop.early_stopping import Best, EarlyStopping, StoppingState, is_better, keep_best
from steploop.errors import ConfigError

metrics = st.floats(-3, 3) | st.integers(-3, 3).map(float) | st.sampled_from([math.nan, math.inf, -math.inf])
histories = st.lists(metrics, max_size=30)
patiences = st.integers(1, 6)
deltas = st.sampled_from([0.0, 1e-4, 0.1, 0.5, 1.0]) | st.floats(0, 5)
modes = st.sampled_from(["min", "max"])


def run(early, history):
    return reduce(early.update, history, early.init())


def stop_check(early, history):
    """The 1-based check at which the run stops, or infinity."""
    states = accumulate(history, early.update, initial=early.init())
    return next((check for check, state in enumerate(states) if state.stopped), math.inf)


@given(history=histories, patience=patiences, min_delta=deltas, mode=modes)
def test_it_stops_at_the_patience_th_bad_check_in_a_row_and_never_before(history, patience, min_delta, mode):
    """Against the definition, written without a fold: a check is bad unless it beats all the ones before it."""
    sign = 1 if mode == "min" else -1
    bad = []
    for check, value in enumerate(history):
        before = [sign * old for old in history[:check] if not math.isnan(old)]
        good = not math.isnan(value) and (not before or sign * value < min(before) - min_delta)
        bad.append(not good)
    expected = next(
        (end for end in range(patience, len(bad) + 1) if all(bad[end - patience : end])),
        math.inf,
    )
    early = EarlyStopping(patience=patience, min_delta=min_delta, mode=mode)
    assert stop_check(early, history) == expected
    assert run(early, history).stopped == (expected <= len(history))


@given(history=histories, patience=patiences, min_delta=deltas, mode=modes)
def test_best_is_the_running_best_and_never_nan(history, patience, min_delta, mode):
    numbers = [value for value in history if not math.isnan(value)]
    best = (min if mode == "min" else max)(numbers, default=None)
    assert run(EarlyStopping(patience=patience, min_delta=min_delta, mode=mode), history).best == best


@given(history=histories, patience=patiences, more=st.integers(0, 5), min_delta=deltas, mode=modes)
def test_more_patience_never_stops_earlier(history, patience, more, min_delta, mode):
    less = EarlyStopping(patience=patience, min_delta=min_delta, mode=mode)
    assert stop_check(attrs.evolve(less, patience=patience + more), history) >= stop_check(less, history)


@given(history=histories, patience=patiences, min_delta=deltas, more=deltas, mode=modes)
@example(history=[10.0, 9.3, 8.9, 8.9, 8.9], patience=2, min_delta=0.5, more=0.5, mode="min")
def test_more_min_delta_never_stops_later(history, patience, min_delta, more, mode):
    """The example breaks it where the value to beat is the last one that counted, as in Lightning and Keras."""
    less = EarlyStopping(patience=patience, min_delta=min_delta, mode=mode)
    assert stop_check(attrs.evolve(less, min_delta=min_delta + more), history) <= stop_check(less, history)


@given(history=histories, patience=patiences, min_delta=deltas)
def test_max_of_a_metric_is_min_of_its_negative(history, patience, min_delta):
    least = EarlyStopping(patience=patience, min_delta=min_delta, mode="min")
    most = attrs.evolve(least, mode="max")
    for low, high in zip(
        accumulate([-value for value in history], least.update, initial=least.init()),
        accumulate(history, most.update, initial=most.init()),
        strict=True,
    ):
        assert low == (high if high.best is None else attrs.evolve(high, best=-high.best))


@given(history=histories, patience=patiences, min_delta=deltas, mode=modes, data=st.data())
def test_splitting_the_history_and_resuming_changes_nothing(history, patience, min_delta, mode, data):
    """With the state written as JSON in between."""
    early = EarlyStopping(patience=patience, min_delta=min_delta, mode=mode)
    cut = data.draw(st.integers(0, len(history)))
    saved = json.dumps(attrs.asdict(run(early, history[:cut])))
    resumed = reduce(early.update, history[cut:], StoppingState(**json.loads(saved)))
    assert resumed == run(early, history)


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
