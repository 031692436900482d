"""The range test: it suggests where the loss falls, and disturbs nothing."""

import itertools
import math

import attrs
import pytest
import torch
from torch import nn

from steploop import (
    Optimizer,
    TrainState,
    backward_scaled,
    checkpoint,
    constant,
    forward_loss,
    optimizer_step,
    schedule,
    unscale_and_clip,
)
from steploop.errors import ConfigError, EmptyDataError
from steploop.recipe.recipe import Recipe
from steploop.tools.lr_finder import RangeTest, centred_means, range_test, suggest


@attrs.frozen
class Lines:
    """Batches of a noisy line, four to an epoch."""

    count: int = 4

    def __len__(self):
        return self.count

    def epoch(self, epoch, start=0):
        for index in range(start, self.count):
            x = torch.randn(32, 3, generator=torch.Generator().manual_seed(1000 * epoch + index))
            yield x, x @ torch.tensor([[1.0], [-2.0], [0.5]])


def objective(model, batch):
    x, y = batch
    return (model(x) - y).square().mean()


def train_step(state, batch):
    state = forward_loss(state, batch, objective)
    state = unscale_and_clip(backward_scaled(state), max_norm=math.inf)
    return schedule(optimizer_step(state), constant(0.123))


def a_recipe(step=train_step, batches=None, *, several=False, factor=1.0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.1), nn.Linear(8, 1))
    state = TrainState.create(model, Optimizer(torch.optim.SGD, lr=0.01, momentum=0.5))
    if several:
        other = TrainState.create(nn.Linear(3, 1), Optimizer(torch.optim.SGD, lr=0.05))
        return Recipe(
            state={"main": state, "other": other},
            train_step=step,
            batches=Lines() if batches is None else batches,
            epochs=1,
        )
    return Recipe(state=state, train_step=step, batches=Lines() if batches is None else batches, epochs=1)


def test_the_rates_rise_by_equal_factors_from_low_to_high():
    plan = RangeTest(low=1e-4, high=1.0, steps=11)
    rates = [plan.rate(i) for i in range(11)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[-1] == pytest.approx(1.0)
    assert all(b / a == pytest.approx(rates[1] / rates[0]) for a, b in itertools.pairwise(rates))


def test_the_state_is_bit_for_bit_as_it_was():
    recipe = a_recipe()
    before, seed = checkpoint.digest(recipe.state), torch.initial_seed()
    generator = torch.random.get_rng_state()
    range_test(recipe, RangeTest(steps=30))
    assert checkpoint.digest(recipe.state) == before
    assert torch.random.get_rng_state().equal(generator)
    assert torch.initial_seed() == seed
    untouched = a_recipe()
    batch = next(Lines().epoch(0))
    after, expected = train_step(recipe.state, batch), train_step(untouched.state, batch)
    assert checkpoint.digest(after) == checkpoint.digest(expected)


def test_the_same_test_twice_gives_the_same_curve():
    recipe = a_recipe()
    assert range_test(recipe, RangeTest(steps=40)) == range_test(recipe, RangeTest(steps=40))


def test_the_suggestion_lies_where_the_loss_falls_and_trains():
    recipe = a_recipe()
    found = range_test(recipe, RangeTest(low=1e-5, high=100.0, steps=80))
    assert 1e-3 < found.suggestion < 1.0
    assert found.suggestion in found.rates
    assert found.rule.startswith("the smoothed loss falls fastest per decade")
    assert len(found.rates) < 80  # it gave up when the loss exploded
    assert len(found.rates) == len(found.losses) == len(found.smooth)


def test_the_first_loss_is_that_of_the_untrained_model_and_is_smoothed_to_itself():
    recipe = a_recipe()
    expected = forward_loss(recipe.state, next(Lines().epoch(0)), objective).loss.item()
    found = range_test(recipe, RangeTest(steps=10))
    assert found.losses[0] == pytest.approx(expected)
    assert found.smooth[0] == pytest.approx(expected)


def test_smoothing_is_a_centred_mean_that_does_not_lag():
    found = range_test(a_recipe(), RangeTest(steps=12, window=5, high=1e-3))
    for i, value in enumerate(found.smooth):
        reach = min(2, i, 11 - i)
        assert value == pytest.approx(sum(found.losses[i - reach : i + reach + 1]) / (2 * reach + 1))
    assert centred_means([0.0, 1.0, 2.0, 3.0, 4.0], 3) == (0.0, 1.0, 2.0, 3.0, 4.0)
    assert centred_means([1.0, None, 3.0], 3) == (1.0, None, 3.0)


def test_the_slope_is_per_decade_and_the_steepest_before_the_minimum_wins():
    rates = tuple(10.0**-k for k in range(9, -1, -1))
    assert suggest(rates, (9.0, 9.0, 8.9, 7.0, 4.0, 3.5, 3.4, 3.4, 5.0, 1e6))[0] == pytest.approx(1e-6)
    assert suggest(rates, (1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9))[0] is None
    assert suggest((1.0,), (None,))[0] is None


def test_a_loss_that_is_not_finite_ends_the_test():
    def broken(state, batch):
        x, y = batch
        return train_step(state, (x, y * (math.nan if state.attempted_steps == 5 else 1.0)))

    found = range_test(a_recipe(broken), RangeTest(steps=50))
    assert len(found.rates) == 6
    assert found.losses[-1] is None


def test_a_schedule_in_the_wrong_place_is_noticed():
    def early(state, batch):
        return train_step(schedule(state, constant(0.5)), batch)

    with pytest.raises(ConfigError) as caught:
        range_test(a_recipe(early), RangeTest(steps=10))
    assert str(caught.value) == (
        "lr-find: the train step was given the learning rate 1e-06, but the optimizer used 0.5. Its schedule must be its "
        "last line: schedule(state, ...) sets the rate of the next step."
    )


def test_one_of_several_states_is_varied_and_the_others_keep_their_rate():
    seen = []

    def both(states, batch):
        seen.append((states["main"].learning_rate, states["other"].learning_rate))
        return {name: train_step(state, batch) for name, state in states.items()}

    found = range_test(a_recipe(both, several=True), RangeTest(steps=10), which="main")
    assert [main for main, _ in seen] == pytest.approx(list(found.rates))
    assert [other for _, other in seen] == pytest.approx([0.05] + [0.123] * 9)
    with pytest.raises(
        ConfigError,
        match=r"trains several states \(main, other\). Say whose rate to vary, as with --state main",
    ):
        range_test(a_recipe(both, several=True))
    with pytest.raises(ConfigError, match="trains one state, but --state main was given"):
        range_test(a_recipe(), which="main")


def test_batches_begin_again_and_their_iterator_is_closed():
    closed = []

    class Closing:
        def __len__(self):
            return 3

        def epoch(self, epoch, start=0):
            try:
                yield from Lines(3).epoch(epoch)
            finally:
                closed.append(epoch)

    range_test(a_recipe(batches=Closing()), RangeTest(steps=10, high=1e-3))
    assert closed[:3] == [0, 1, 2]
    with pytest.raises(EmptyDataError, match="there is nothing to test a learning rate on"):
        range_test(a_recipe(batches=Lines(0)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"low": 1.0, "high": 0.1}, "RangeTest: high must be > low (1.0), got 0.1."),
        ({"low": 0.0}, "RangeTest: low must be a finite number > 0, got 0.0."),
        ({"steps": 5}, "RangeTest: steps must be an integer >= 10, got 5."),
        ({"window": 0}, "RangeTest: window must be an integer >= 1, got 0."),
        ({"stop_factor": 1.0}, "RangeTest: stop_factor must be a finite number > 1, got 1.0."),
    ],
)
def test_settings_that_make_no_test_are_refused(values, message):
    with pytest.raises(ConfigError) as caught:
        RangeTest(**values)
    assert str(caught.value).startswith(message)


def test_the_optimizer_keeps_no_hook():
    recipe = a_recipe()
    range_test(recipe, RangeTest(steps=10))
    assert not recipe.state.machine.optimizer._optimizer_step_pre_hooks
