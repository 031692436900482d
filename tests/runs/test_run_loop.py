"""The loop of a run: what it folds, what it logs when, and what it refuses."""

import csv
import ctypes
import json
import math
import shutil
from functools import reduce

import attrs
import points_recipe
import pytest
import torch
from running import digest, lines, train
from torch import nn

from steploop import (
    EarlyStopping,
    Optimizer,
    ReduceLROnPlateau,
    TrainState,
    backward_scaled,
    forward_loss,
    optimizer_step,
    unscale_and_clip,
)
from steploop.core.interruption import check_interruption
from steploop.core.state.several import members
from steploop.data import Loader
from steploop.errors import ConfigError, EmptyDataError, NonFiniteError
from steploop.recipe.recipe import Recipe
from steploop.runs.allocator import tune_allocator
from steploop.runs.logs.screens import QuietScreen
from steploop.runs.loop import Loop
from steploop.runs.members import attempted_steps
from steploop.runs.monitoring import fold_metrics, prepared
from steploop.runs.pace import Pace
from steploop.runs.plan import Plan
from steploop.runs.signals import StopFlag

X = torch.linspace(-1, 1, 24).reshape(24, 1)


def objective(model, batch):
    return (model(batch) - 2 * batch).square().mean(), {"logits": model(batch)}


def a_state(seed=0):
    torch.manual_seed(seed)
    return TrainState.create(nn.Linear(1, 1), Optimizer(torch.optim.SGD, lr=0.05), seed=seed)


def step_of(state, batch):
    state = forward_loss(state, batch, objective)
    return optimizer_step(unscale_and_clip(backward_scaled(state), max_norm=1.0))


def a_recipe(**changes):
    values = {
        "state": a_state(),
        "train_step": step_of,
        "batches": Loader(X, batch_size=4, seed=0),
        "epochs": 2,
    }
    return Recipe(**(values | changes))


class Told:
    """A journal, a keeper and a witness that remember."""

    def __init__(self):
        self.trains, self.evaluations, self.events, self.saved = [], [], [], []

    def train(self, line):
        self.trains.append(line)

    def evaluation(self, line):
        self.evaluations.append(line)

    def event(self, line):
        self.events.append(line)

    def save(self, state, *, best):
        self.saved.append((attempted_steps(state), best))


def fold(recipe, stop=None, **plan):
    told = Told()
    loop = Loop(recipe, plan=Plan(**plan), journal=told, keeper=told, stop=stop or StopFlag(), begun_s=0.0)
    state, ending = loop.run(prepared(recipe, recipe.state))
    return state, ending, told


def test_an_epoch_is_the_fold_over_its_batches():
    state, ending, told = fold(a_recipe())
    batches = Loader(X, batch_size=4, seed=0)
    by_hand = reduce(step_of, [b for epoch in range(2) for b in batches.epoch(epoch)], a_state())
    assert all(torch.equal(state.params[name], by_hand.params[name]) for name in by_hand.params)
    assert (ending, state.epoch, state.batch, state.step) == ("finished", 2, 0, 12)
    assert told.saved == [
        (6, False),
        (12, False),
        (12, False),
    ]  # the last one is given again; keepers know it


def test_lines_come_at_the_first_step_and_at_multiples():
    _, _, told = fold(a_recipe(), log_every=5)
    assert [line["attempted"] for line in told.trains] == [1, 5, 10]
    _, _, told = fold(a_recipe(batches=Loader(X.repeat(50, 1), batch_size=4, seed=0), epochs=1))
    assert [line["attempted"] for line in told.trains] == [1, *range(30, 301, 30)]  # ten times an epoch


def test_several_states_are_trained_and_logged_by_name():
    def both(states, batch):
        second = step_of(states["second"], batch)
        return {"first": step_of(states["first"], batch), "second": step_of(second, batch)}

    recipe = a_recipe(state={"first": a_state(0), "second": a_state(1)}, train_step=both, epochs=1)
    states, _, told = fold(recipe, log_every=4)
    assert {name: one.step for name, one in members(states).items()} == {"first": 6, "second": 12}
    assert {(one.epoch, one.batch) for one in members(states).values()} == {(1, 0)}
    assert [line["attempted"] for line in told.trains] == [4, 8, 12]
    assert {"first.loss", "second.loss", "second.learning_rate"} <= set(told.trains[0])


def test_several_states_are_stopped_and_resumed(tmp_path):
    recipe = tmp_path / "pair.py"
    recipe.write_text(
        "import sys\nimport attrs\nimport test_run_loop as t\n"
        "@attrs.frozen\nclass Config:\n    epochs: int = 2\n    seed: int = 0\n"
        "def step(states, batch):\n    return {name: t.step_of(one, batch) for name, one in states.items()}\n"
        "def build(config, device):\n"
        "    return t.a_recipe(state={'a': t.a_state(0), 'b': t.a_state(1)}, train_step=step, epochs=config.epochs)\n"
    )
    train(tmp_path / "whole", recipe=str(recipe))
    train(tmp_path / "run", recipe=str(recipe), stop_at=8)
    train(tmp_path / "run", resume=True)
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")


def test_metrics_of_training_batches_are_logged_where_asked():
    recipe = a_recipe(
        train_metrics={"positive": lambda outputs, _: ((outputs["logits"] > 0).sum(), 4)}, epochs=1
    )
    _, _, told = fold(recipe, log_every=3)
    assert all(0 <= line["positive"] <= 1 for line in told.trains)


def test_a_recipe_without_batches_is_refused_before_the_first_step():

    class Empty:
        def __len__(self):
            return 0

        def epoch(self, epoch, start=0):
            return []

    with pytest.raises(EmptyDataError, match="The recipe's batches are empty"):
        fold(a_recipe(batches=Empty()))

    class Lying(Empty):
        def __len__(self):
            return 3

    with pytest.raises(EmptyDataError, match=r"Epoch 1 has not a single batch, although len\(batches\) is 3"):
        fold(a_recipe(batches=Lying()))


def test_batches_may_be_any_iterable_that_knows_epochs():
    class Plain:
        def __len__(self):
            return 3

        def epoch(self, epoch, start=0):
            return [X[:4] + epoch] * (3 - start)

    state, _, _ = fold(a_recipe(batches=Plain()))
    assert (state.step, state.epoch) == (6, 2)


def measured(*values, **fields):
    """A recipe whose evaluations give these values, one after the other."""
    left = iter(values)
    return a_recipe(evaluate=lambda _: {"loss": next(left)}, monitor="loss", epochs=len(values), **fields)


@pytest.mark.parametrize(
    ("values", "best"),
    [
        ([math.nan, 2.0, 1.0], 1.0), ([1.0, math.nan, 2.0], 1.0), ([math.nan] * 3, None), ([None, 3.0, 3.0], 3.0),
        ([math.inf, 5.0, 6.0], 5.0),
    ],
)  # fmt: skip
def test_a_metric_that_is_not_a_number_is_never_the_best(values, best):
    state, _, told = fold(measured(*values))
    assert (None if state.best is None else state.best.value) == best
    flags = [line["best"] for line in told.evaluations]
    assert [attempted for attempted, is_best in told.saved if is_best] == [
        6 * (n + 1) for n, flag in enumerate(flags) if flag
    ]


def test_of_equal_values_the_first_is_the_best_and_max_is_the_other_way_round():
    state, _, _ = fold(measured(1.0, 1.0, 0.5, mode="max"))
    assert (state.best.value, state.best.step, state.best.epoch) == (1.0, 6, 0)


def test_patience_runs_out_on_values_that_are_not_numbers():
    recipe = measured(*[math.nan] * 9, early_stopping=EarlyStopping(patience=2))
    state, ending, told = fold(recipe)
    assert (ending, state.epoch, state.early_stopping.bad_checks) == ("early_stop", 2, 2)
    assert [line["event"] for line in told.events] == ["early_stop"]


def test_a_plateau_lowers_the_rate_that_the_state_carries():
    state, _, _ = fold(measured(1.0, 1.0, 1.0, plateau=ReduceLROnPlateau(lr=0.1, patience=0)))
    assert state.plateau.learning_rate == pytest.approx(0.001)


def test_a_monitored_metric_that_nobody_computes_is_named():
    with pytest.raises(
        ConfigError,
        match=r"Recipe\(monitor=...\) names 'acuracy', which evaluate does not give. Did you mean accuracy\?",
    ):
        fold_metrics(a_recipe(monitor="acuracy"), a_state(), {"loss": 1.0, "accuracy": 0.5})


def test_evaluations_within_an_epoch_and_one_at_the_end():
    seen = []
    recipe = a_recipe(
        evaluate=lambda state: {"loss": float(seen.append(state.step) or 1)}, eval_every_steps=5
    )
    fold(recipe)
    assert seen == [5, 10, 12]
    # three optimizer steps a batch: the last batch goes over 35, and the evaluation there is that of the end
    seen.clear()
    thrice = lambda state, batch: reduce(step_of, [batch] * 3, state)  # noqa: E731  (a recipe's field)
    fold(attrs.evolve(recipe, train_step=thrice, state=a_state()))
    assert seen == [6, 12, 15, 21, 27, 30, 36]


def test_a_limit_ends_with_an_evaluation_that_is_not_folded():
    recipe = a_recipe(evaluate=lambda _: {"loss": 1.0}, monitor="loss")
    state, ending, told = fold(recipe, limit_steps=4)
    assert (ending, state.step, state.best) == ("limit", 4, None)
    assert [line["metrics"] for line in told.evaluations] == [{"loss": 1.0}]


def test_nobody_asks_whether_to_stop_outside_of_a_run():
    check_interruption()
    flag = StopFlag()
    flag.handle(15)
    flag.check()  # a set flag is no exception where a step may be half done


def test_a_device_that_counts_for_itself_is_asked_at_each_line(monkeypatch):

    def counting(state, batch):
        return attrs.evolve(step_of(state, batch), nonfinite_steps=torch.tensor(100))

    with pytest.raises(NonFiniteError, match="100 steps in a row"):
        fold(a_recipe(train_step=counting), log_every=2)


def test_a_logger_that_fails_costs_nothing(tmp_path, monkeypatch):
    def failing(self, step, values):
        raise RuntimeError("full")

    monkeypatch.setattr("steploop.runs.logs.CsvTable.__call__", failing)
    said = []
    screen = QuietScreen()
    screen.note = said.append
    assert train(tmp_path / "run", csv=True, screen=screen).state == "finished"
    assert [text for text in said if "CsvTable failed" in text] == [
        "The logger CsvTable failed and is left out from here on: RuntimeError: full"
    ]


def test_finish_is_called_once_with_the_last_state_and_the_directory(tmp_path, monkeypatch):
    calls = []
    build = points_recipe.build
    recipe = tmp_path / "mine.py"
    recipe.write_text(
        "from points_recipe import Config\nimport points_recipe\ndef build(config, device):\n    return points_recipe.finishing(config, device)\n"
    )
    finish = lambda state, path: calls.append((state.step, path))  # noqa: E731  (a recipe's field)
    monkeypatch.setattr(
        points_recipe, "finishing", lambda c, d: attrs.evolve(build(c, d), finish=finish), raising=False
    )
    train(tmp_path / "run", recipe=str(recipe), stop_at=3)
    assert calls == []
    train(tmp_path / "run", resume=True)
    assert [path for _, path in calls] == [tmp_path / "run"]


def test_a_resume_goes_on_logging_and_keeping_as_before(tmp_path):
    train(tmp_path / "run", log_every=3, checkpoint_every=4, csv=True, stop_at=6)
    train(tmp_path / "run", resume=True, log_every=None)
    steps = [line["attempted"] for line in lines(tmp_path / "run") if line["kind"] == "train"]
    assert steps == [1, 3, 6, 9, 12]
    config = json.loads((tmp_path / "run" / "config.json").read_bytes())
    assert (config["watching"]["checkpoint_every"], config["watching"]["csv"]) == (4, True)


@pytest.mark.parametrize("lost", [1, 9], ids=["the newest checkpoint", "all of them"])
@pytest.mark.parametrize("phases", ["false", "true"])
def test_a_table_holds_each_line_once_though_some_steps_were_taken_twice(lost, phases, tmp_path):
    """As after a kill: the checkpoints of some steps that are in the table are not there."""

    def table(out):
        with (out / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        clocks = {"train/samples_per_s", "train/data_wait", "train/time_s", "eval/time_s"}
        return [{name: value for name, value in row.items() if name not in clocks} for row in rows]

    values = {"phases": phases}
    train(tmp_path / "whole", values, csv=True, checkpoint_every=3)
    train(tmp_path / "run", values, csv=True, checkpoint_every=3, stop_at=11)
    for newest in sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-lost:]:
        shutil.rmtree(newest)
    if lost > 1:  # the kill came before the first one: status.json names none
        status = tmp_path / "run" / "status.json"
        status.write_text(json.dumps({**json.loads(status.read_bytes()), "checkpoint": None}))
    for name in ("metrics.csv", "metrics.jsonl", "status.json"):  # half written when the kill came
        (tmp_path / "run" / f".{name}-4194305").touch()
    train(tmp_path / "run", resume=True)
    assert table(tmp_path / "run") == table(tmp_path / "whole")
    assert not [path.name for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]


def test_the_pace_counts_the_time_in_which_steps_are_taken():
    now = [100.0]
    pace = Pace(90.0, clock=lambda: now[0])

    def after(seconds):
        now[0] += seconds

    after(5)  # it has not begun
    pace.go()
    after(2)
    pace.trained(torch.zeros(12, 3))
    pace.waited(0.5)
    assert pace.stand()
    after(50)  # an evaluation and a checkpoint
    assert not pace.stand()
    pace.go()
    after(1)
    pace.trained(torch.zeros(6))
    pace.waited(1.0)
    assert pace.read() == {"samples_per_s": 6.0, "data_wait": 0.5, "time_s": 68.0}
    after(4)
    pace.trained(torch.zeros(4))
    pace.waited(10.0)
    assert pace.read() == {"samples_per_s": 1.0, "data_wait": 1.0, "time_s": 72.0}
    assert pace.read() == {"samples_per_s": 0.0, "data_wait": 0.0, "time_s": 72.0}


def test_the_allocator_is_tuned_where_there_is_glibc():
    thresholds = tune_allocator()
    if hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        assert thresholds == {"M_MMAP_THRESHOLD": 32 << 20, "M_TRIM_THRESHOLD": (2 << 30) - 1}
