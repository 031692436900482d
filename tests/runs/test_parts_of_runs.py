"""``--parts`` in one process: the batches of a run in parts, recorded, and kept by a resume."""

import json

import attrs
import parted_recipe
import pytest
import torch
from running import changed, digest, lines, train

import steploop
from steploop import (
    Ranks,
    accumulate,
    backward_scaled,
    checkpoint,
    forward_loss,
    optimizer_step,
    unscale_and_clip,
)
from steploop.core.state.with_ranks import with_ranks
from steploop.errors import ConfigError
from steploop.tools.cli import call

RECIPE = parted_recipe.__file__
CPU = torch.device("cpu")


def test_a_run_in_parts_takes_the_steps_of_a_loop_over_parts(tmp_path):
    """Bit for bit: the loop shares no line with the run."""
    train(tmp_path / "run", recipe=RECIPE, parts=4)
    recipe = parted_recipe.build(parted_recipe.Config(), CPU)
    state, ranks = with_ranks(recipe.state, Ranks(parts=4)), Ranks(parts=4)
    for epoch in range(2):
        for parts in recipe.batches.in_parts(ranks, epoch):
            state = recipe.train_step(state, parts)
    newest = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    like = with_ranks(parted_recipe.build(parted_recipe.Config(), CPU).state, ranks)
    loaded = checkpoint.load(newest, like=like)
    assert all(torch.equal(loaded.params[name], value) for name, value in state.params.items())
    assert all(torch.equal(loaded.buffers[name], value) for name, value in state.buffers.items())
    assert json.loads((tmp_path / "run" / "config.json").read_bytes())["parts"] == 4


def test_a_stopped_run_goes_on_with_the_parts_that_it_began_with(tmp_path):
    train(tmp_path / "whole", recipe=RECIPE, parts=2)
    train(tmp_path / "cut", recipe=RECIPE, parts=2, stop_at=4)
    train(tmp_path / "cut", resume=True)
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")
    assert train(tmp_path / "other", recipe=RECIPE, parts=4).state == "finished"
    assert digest(tmp_path / "other") != digest(tmp_path / "whole")


def test_other_parts_than_those_of_the_run_are_refused_at_a_resume(tmp_path):
    train(tmp_path / "run", {"epochs": 1}, recipe=RECIPE, parts=2, stop_at=2)
    with pytest.raises(
        ConfigError, match=r"^--parts 4: the batches of this run have 2, .* Leave --parts out"
    ):
        train(tmp_path / "run", resume=True, parts=4)
    train(tmp_path / "plain", {"epochs": 1}, recipe=RECIPE, stop_at=2)
    with pytest.raises(ConfigError, match=r"^--parts 2: the batches of this run have 1, "):
        train(tmp_path / "plain", resume=True, parts=2)
    train(tmp_path / "run", resume=True, parts=2)


def test_a_batch_with_fewer_samples_than_parts_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(
        ConfigError, match=r"^A batch of 8 samples cannot be cut into 9 parts\. .*--parts 8\.$"
    ):
        train(tmp_path / "run", recipe=RECIPE, parts=9)
    assert not (tmp_path / "run").exists()


def test_the_mode_of_the_sums_is_kept_unless_it_is_given_anew(tmp_path):
    def mode():
        return json.loads((tmp_path / "run" / "config.json").read_bytes())["ranks"]

    train(tmp_path / "run", {"epochs": 1}, recipe=RECIPE, parts=2, fast=True, stop_at=1)
    assert mode() == "fast"
    train(tmp_path / "run", resume=True, stop_at=2)
    assert mode() == "fast"
    train(tmp_path / "run", resume=True, fast=False)
    assert mode() == "exact"
    resumed = [line for line in lines(tmp_path / "run") if line.get("event") == "resumed"]
    assert [line.get("changed") for line in resumed] == [None, {"--ranks": ["fast", "exact"]}]


def test_one_part_is_a_run_without_parts(tmp_path):
    train(tmp_path / "plain", {"epochs": 1}, recipe=RECIPE)
    train(tmp_path / "one", {"epochs": 1}, recipe=RECIPE, parts=1)
    assert digest(tmp_path / "one") == digest(tmp_path / "plain")


def test_the_command_line_and_python_cut_the_same_parts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["--quiet", "--no-tune", "--device", "cpu", "--epochs", "1"]
    assert call(["run", RECIPE, "--out", "line", "--parts", "2", "--ranks", "exact", *given]) == 0
    recipe = parted_recipe.build(parted_recipe.Config(epochs=1), CPU)
    steploop.run(recipe, out="python", parts=2, progress="none")
    assert digest(tmp_path / "line") == digest(tmp_path / "python")
    with pytest.raises(ConfigError, match='ranks must be "exact" or "fast", but is \'quick\''):
        steploop.run(recipe, ranks="quick", progress="none")


def test_samples_per_second_count_all_parts(tmp_path, monkeypatch):
    counted = []
    monkeypatch.setattr("steploop.runs.pace.Pace.read", lambda pace: counted.append(pace._samples) or {})
    train(tmp_path / "run", {"epochs": 1}, recipe=RECIPE, parts=2, log_every=100)
    train(tmp_path / "plain", {"epochs": 1}, recipe=RECIPE, log_every=100)
    assert counted == [8, 8]


def first_logits(outputs, batch):
    """A sum that takes outputs and batch of one part, and weighs its samples."""
    logits = torch.cat([o["logits"] for o in outputs]) if isinstance(outputs, list) else outputs["logits"]
    return (logits[:, 0] * (1 + batch[1])).sum(), len(batch[1])


@pytest.mark.parametrize("accumulates", [False, True])
def test_metrics_of_training_batches_are_weighted_over_parts(tmp_path, accumulates):
    """By the loss that the same step computes: the mean over parts of what the objective gives for each."""

    def objective(model, batch):
        logits = model(batch[0])
        return (logits[:, 0] * (1 + batch[1])).mean(), {"logits": logits}

    def change(recipe, config):
        def train_step(state, batch):
            if accumulates:
                x, y = batch
                state = accumulate(state, [(x[:2], y[:2]), (x[2:], y[2:])], objective)
            else:
                state = backward_scaled(forward_loss(state, batch, objective))
            return optimizer_step(unscale_and_clip(state, max_norm=1.0))

        samples = 48 if accumulates else 45  # the last of five samples: parts of two and three
        inner = parted_recipe.build(parted_recipe.Config(samples=samples, epochs=1), CPU)
        return attrs.evolve(inner, train_step=train_step, train_metrics={"first": first_logits})

    train(tmp_path / "run", recipe=changed(tmp_path, change), parts=2)
    seen = [line for line in lines(tmp_path / "run") if line["kind"] == "train"]
    assert len(seen) == 6
    assert [line["first"] for line in seen] == pytest.approx([line["loss"] for line in seen], rel=1e-5)


def test_phases_of_a_recipe_keep_the_parts(tmp_path):
    def second(recipe, config):
        own = parted_recipe.build(parted_recipe.Config(epochs=1, seed=1), CPU)
        first = parted_recipe.build(parted_recipe.Config(epochs=1), CPU)
        return attrs.evolve(first, then=lambda _: own)

    path = changed(tmp_path, second)
    train(tmp_path / "run", recipe=path, parts=2)
    train(tmp_path / "alone", {"epochs": 1, "seed": 1}, recipe=RECIPE, parts=2)
    assert digest(tmp_path / "run", "-phase-2")[1] == digest(tmp_path / "alone")[1]
