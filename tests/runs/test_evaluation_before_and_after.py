"""What a run asks of an evaluation: numbers, by a trial before the first step; and it never costs the epoch before it."""

import json
import random

import attrs
import numpy as np
import pytest
import torch
from running import changed, digest, lines, steps, train, wait_until
from torch import nn

from steploop import Optimizer, TrainState, evaluate
from steploop.checkpoint import digest as digest_of
from steploop.core.steps.trial import trial_evaluations
from steploop.data import Loader
from steploop.errors import ConfigError, ObjectiveError
from steploop.recipe import Recipe
from steploop.runs.metric_values import read_metrics
from steploop.runs.trial_evaluation import try_evaluation


def evaluating(function):
    """A change of a recipe: another evaluation, and nothing monitored by early stopping."""

    def change(recipe, _):
        return attrs.evolve(recipe, evaluate=function(recipe.evaluate), early_stopping=None)

    return change


@pytest.mark.parametrize(
    "value",
    [
        np.float32(0.5),
        np.float64(0.5),
        np.array(0.5),
        torch.tensor(0.5),
        torch.tensor(0.5, requires_grad=True),
    ],
    ids=repr,
)
def test_numbers_of_numpy_and_tensors_without_axes_are_numbers(value):
    found = read_metrics({"loss": value, "none": None, "count": np.int64(3), "yes": np.bool_(True)})  # noqa: FBT003
    assert found == {"loss": 0.5, "none": None, "count": 3, "yes": 1.0}
    assert {type(number) for number in found.values()} == {float, int, type(None)}


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ({"loss": "bad"}, "the metric 'loss' must be a number or None, but is a str 'bad'"),
        (
            {"loss": torch.ones(2)},
            "the metric 'loss' must be a number or None, but is a Tensor of shape (2,)",
        ),
        ({"loss": {"a": 1}}, "the metric 'loss' must be a number or None, but is a dict {'a': 1}"),
        ({"loss": 1j}, "is a complex 1j"),
        ({1: 0.5}, "the name of a metric must be a text, but one is 1"),
        (0.5, "must return a mapping of metric names to numbers, but returned float"),
        (None, "must return a mapping of metric names to numbers, but returned NoneType"),
    ],
)
def test_what_is_no_number_is_refused_by_name_before_anything_is_trained(returned, said, tmp_path):
    with pytest.raises(ObjectiveError) as caught:
        train(tmp_path / "run", recipe=changed(tmp_path, evaluating(lambda _: lambda _: returned)))
    assert said in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_monitored_metric_that_is_missing_is_found_before_the_first_step(tmp_path):
    with pytest.raises(ConfigError, match=r"names 'loss', which evaluate does not give. Did you mean los\?"):
        train(tmp_path / "run", recipe=changed(tmp_path, evaluating(lambda _: lambda _: {"los": 1.0})))
    assert not (tmp_path / "run").exists()


def a_state(**options):
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 1))
    return TrainState.create(model, Optimizer(torch.optim.SGD, lr=0.1), **options)


def squared(model, batch):
    return model(batch).square().mean()


def a_recipe(evaluation, **options):
    return Recipe(
        state=a_state(**options), train_step=None, batches=[0], epochs=1, evaluate=evaluation, monitor="loss"
    )


def drawn():
    return torch.rand(()).item(), random.random(), np.random.rand()  # noqa: NPY002


def test_a_trial_sees_one_batch_and_leaves_state_and_generators_as_they_were():
    seen = []

    def evaluation(state):
        drawn()
        return evaluate(state, (seen.append(n) or torch.randn(5, 2) for n in range(100)), squared)

    recipe = a_recipe(evaluation)
    before = digest_of(recipe.state)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    expected = drawn()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    assert try_evaluation(recipe, recipe.state) == "raw"
    assert drawn() == expected
    assert seen == [0]
    assert digest_of(recipe.state) == before
    evaluation(recipe.state)
    assert len(seen) == 101  # afterwards an evaluation is whole again


def test_a_loop_over_a_loader_sees_one_batch_in_a_trial():
    seen, batches = [], Loader(torch.randn(12, 2), batch_size=3, seed=0, num_workers=1)

    def evaluation(_):
        seen.extend(batches)
        return {"loss": float(len(seen))}

    recipe = a_recipe(evaluation)
    assert try_evaluation(recipe, recipe.state) is None
    assert len(seen) == 1
    assert len(list(batches)) == 4


@pytest.mark.parametrize(
    ("averages", "found"), [((), None), ((True,), "average"), ((False,), "raw"), ((True, False), None)]
)
def test_a_trial_says_which_weights_are_evaluated(averages, found):
    def evaluation(state):
        for average in averages:
            evaluate(state, [torch.ones(2, 2)], squared, use_ema=average)
        return {"loss": 1.0}

    recipe = a_recipe(evaluation, ema=True)
    assert try_evaluation(recipe, recipe.state) == found


def test_an_evaluation_that_needs_more_than_a_batch_is_tried_as_a_whole():
    def evaluation(state):
        count = []
        evaluate(state, [torch.ones(1, 2)] * 3, squared, {"n": lambda *_: (count.append(1) or 1.0, 1)})
        if len(count) < 3:
            raise ValueError("samples of every class are needed")
        return {"loss": 1.0}

    recipe = a_recipe(evaluation)
    assert try_evaluation(recipe, recipe.state) == "raw"


def test_trials_end_with_their_block():
    with pytest.raises(ZeroDivisionError), trial_evaluations():
        raise ZeroDivisionError
    assert evaluate(a_state(), [torch.zeros(1, 2), torch.ones(1, 2)], squared)["loss"] is not None


@pytest.mark.parametrize("eval_every", [None, 3])
def test_an_evaluation_that_fails_costs_no_training_and_is_made_up_for(eval_every, tmp_path):
    values = {} if eval_every is None else {"eval_every": eval_every}
    calls, broken = [0], [True]

    def failing(evaluation):
        def measure(state):
            calls[0] += 1
            if broken[0] and calls[0] == 3:  # the first is the trial
                raise ZeroDivisionError
            return evaluation(state)

        return measure

    recipe = changed(tmp_path, evaluating(failing))
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "run", values, recipe=recipe)
    assert max(line["attempted"] for line in lines(tmp_path / "run")) == (14 if eval_every is None else 6)
    assert len(steps(tmp_path / "run")) == 2
    broken[0] = False
    train(tmp_path / "run", resume=True)
    train(tmp_path / "whole", values, recipe=recipe)
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")
    found, expected = (
        [(line["attempted"], line["metrics"]) for line in lines(tmp_path / out) if line["kind"] == "eval"]
        for out in ("run", "whole")
    )
    assert found == expected


def test_an_epoch_is_saved_before_its_evaluation_begins(tmp_path):
    """A kill in the evaluation costs no training either."""
    seen, out = [], tmp_path / "run"

    def looking(evaluation):
        def measure(state):
            if state.attempted_steps:
                wait_until(lambda: state.step in steps(out))
                seen.append(state.step)
            return evaluation(state)

        return measure

    train(out, {"precision": "fp32"}, recipe=changed(tmp_path, evaluating(looking)))
    assert seen == [7, 14]


def test_the_look_at_the_limit_that_a_kill_has_cost_is_taken_by_the_resume(tmp_path):
    """The limit is met, its checkpoint stands, and the process dies in the evaluation after it."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for out in (whole, cut):
        train(out, limit_steps=5, checkpoint_every=5)
    (cut / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines(cut) if line["kind"] != "eval")
    )
    status = json.loads((cut / "status.json").read_bytes())
    (cut / "status.json").write_text(
        json.dumps({**status, "state": "running", "metrics": {}, "ending": None})
    )
    summary = train(cut, resume=True, limit_steps=5)
    looks = [
        [(line["attempted"], line["metrics"]) for line in lines(out) if line["kind"] == "eval"]
        for out in (whole, cut)
    ]
    assert looks[0] == looks[1]
    assert summary.metrics == looks[0][0][1]
    train(cut, resume=True, limit_steps=5)  # and once only
    assert [line for line in lines(cut) if line["kind"] == "eval"][1:] == []
