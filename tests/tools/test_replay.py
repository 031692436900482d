"""Capsules and replays: a step that was not finite is kept, taken again, and its culprit named."""

import json
import math
from pathlib import Path

import attrs
import pytest
import torch
from torch import nn

from steploop import (
    Optimizer,
    TrainState,
    backward_scaled,
    checkpoint,
    forward_loss,
    optimizer_step,
    unscale_and_clip,
)
from steploop.core.precision import LossScale
from steploop.core.trees import first_difference
from steploop.errors import CheckpointDamagedError, ConfigError, DataError
from steploop.recipe.recipe_files import load_recipe_file
from steploop.runs.capsules.capsule_files import read_capsule
from steploop.runs.capsules.capsule_writer import CapsuleWriter, state_before
from steploop.tools.replay.capsule_replay import replay
from steploop.tools.replay.culprit import judge
from steploop.tools.replay.module_watch import StepWatch
from steploop.tools.replay.tensor_stats import stats_of

EXPLODES = Path(__file__).parents[1] / "helpers" / "broken_recipes" / "explodes.py"


def build(**fields):
    file = load_recipe_file(EXPLODES)
    config = file.config_class(**fields)
    return file, config, file.build(config, torch.device("cpu"))


def explode(run: Path, *, keep_every_state=False, **fields):
    """Fold the broken recipe with a capsule writer beside it, as a run does; the states before each step if asked."""
    run.mkdir(parents=True, exist_ok=True)
    file, config, recipe = build(**fields)
    (run / "recipe.py").write_bytes(file.source)
    recipe_entry = {"path": str(EXPLODES), "name": "explodes", "sha256": file.sha256}
    (run / "config.json").write_text(json.dumps({"recipe": recipe_entry, "config": attrs.asdict(config)}))
    writer, state, found, states = CapsuleWriter(run), recipe.state, [], []
    for epoch in range(recipe.epochs):
        for batch in recipe.batches.epoch(epoch):
            if keep_every_state:
                states.append(state.clone())
            after = recipe.train_step(state, batch)
            if (skipped := writer.after_step(state, after, batch)) is not None:
                found += [] if skipped.capsule is None else [skipped.capsule]
            state = after
        state = state.replace(epoch=epoch + 1, batch=0)
    return found, states


@pytest.mark.parametrize(
    ("where", "phase", "module", "operation"),
    [
        ("forward", "forward", "body.normalise", "aten.div"),
        ("backward", "backward", "body.length", "aten.div"),
        ("between", "forward", "body", "aten.div"),
        ("objective", "objective", None, "aten.log"),
    ],
)
@pytest.mark.parametrize("at", [7, 13])
def test_the_module_and_the_step_that_exploded_are_named(tmp_path, where, phase, module, operation, at):
    found, _ = explode(tmp_path, where=where, at=at)
    assert [path.name for path in found] == [f"step-{at + 1:012d}"]
    again = replay(found[0])
    assert again.capsule.about["attempted"] == at
    assert (again.capsule.about["epoch"], again.capsule.about["batch"]) == divmod(at, 10)
    assert again.reproduced
    assert again.finding is not None
    assert (again.finding.phase, again.finding.module, again.finding.operation) == (phase, module, operation)
    assert again.inexact == ()
    if module is not None:
        assert again.finding.what.startswith(module)


def test_the_statistics_tell_what_went_in(tmp_path):
    (path,), _ = explode(tmp_path, where="forward")
    finding = replay(path).finding
    (went_in,) = finding.went_in
    assert went_in.shape == (8, 6)
    assert went_in.finite
    assert went_in.zeros == 6
    (came_out,) = finding.came_out
    assert came_out.nan == 6
    assert finding.place.startswith("recipe.py, line ")
    assert finding.place.endswith("return x / (x * x).sum(dim=1, keepdim=True).sqrt()")


def test_the_backward_pass_is_also_judged_by_anomaly_detection(tmp_path):
    (path,), _ = explode(tmp_path, where="backward")
    again = replay(path)
    assert again.finding.backward
    assert math.isfinite(float(again.losses[""][1]))
    assert "MulBackward0" in again.anomaly or "SqrtBackward0" in again.anomaly
    assert "recipe.py" in again.anomaly
    assert again.finding.went_in[-1].name == "gradient at its output"
    assert again.finding.went_in[-1].finite


def test_a_capsule_holds_the_state_before_the_step_bit_for_bit(tmp_path):
    (path,), states = explode(tmp_path, where="forward", keep_every_state=True)
    _, _, recipe = build(where="forward")
    loaded, kept = checkpoint.load(path / "state", like=recipe.state), states[7]
    for name in (
        "params",
        "buffers",
        "slots",
        "hyper",
        "seed",
        "epoch",
        "batch",
        "attempted_steps",
        "applied_steps",
    ):
        assert first_difference(getattr(loaded, name), getattr(kept, name), name) is None
    assert loaded.nonfinite_steps == kept.nonfinite_steps == 0
    expected = next(recipe.batches.epoch(0, 7))
    assert first_difference(read_capsule(path).batch, expected) is None


def test_the_loss_scale_of_a_capsule_is_the_one_before_the_step(tmp_path):
    model = nn.Linear(2, 1)
    state = TrainState.create(
        model, Optimizer(torch.optim.SGD, lr=0.1), precision="fp16", loss_scale=LossScale(scale=1024.0)
    )
    before = state
    state = forward_loss(state, torch.full((1, 2), math.inf), lambda m, x: m(x).float().mean())
    state = optimizer_step(unscale_and_clip(backward_scaled(state), max_norm=1.0))
    assert state.scale.scale == 512.0
    path = CapsuleWriter(tmp_path).after_step(before, state, torch.zeros(1)).capsule
    seen = json.loads((path / "capsule.json").read_text())["states"][""]
    assert seen["loss_scale"] == 1024.0
    assert seen["exact"] is True
    assert seen["loss"] in {"nan", "inf", "-inf"}


def test_a_state_that_was_not_donated_is_kept_as_it_was():
    model = nn.Linear(2, 1)
    state = TrainState.create(model, Optimizer(torch.optim.SGD, lr=0.1))
    after = forward_loss(state, torch.full((1, 2), math.nan), lambda m, x: m(x).mean())
    after = optimizer_step(unscale_and_clip(backward_scaled(after), max_norm=1.0), donate=False)
    kept = state_before(state, after)
    assert kept.attempted_steps == 0
    assert kept.params["weight"] is state.params["weight"]


def test_good_steps_leave_nothing_behind(tmp_path):
    found, _ = explode(tmp_path, at=1000)
    assert found == []
    assert not (tmp_path / "capsules").exists()


def skipping_run(tmp_path, skips, *, loss=math.nan, scale=None, steps=12):
    """A fold over ones in which the steps ``skips`` are not finite."""
    precision = "fp32" if scale is None else "fp16"
    state = TrainState.create(
        nn.Linear(2, 1), Optimizer(torch.optim.SGD, lr=0.1), precision=precision, loss_scale=scale
    )
    writer, found = CapsuleWriter(tmp_path), []
    for step in range(steps):
        x = torch.full((1, 2), loss if step in skips else 1.0)
        after = forward_loss(state, x, lambda m, x: m(x).float().mean())
        after = optimizer_step(unscale_and_clip(backward_scaled(after), max_norm=1.0))
        found.append(writer.after_step(state, after, x))
        state = after
    assert [step for step, look in enumerate(found) if look is not None] == sorted(skips)
    return [step for step, look in enumerate(found) if look is not None and look.capsule is not None], sorted(
        p.name for p in (tmp_path / "capsules").iterdir()
    )


def test_of_a_row_of_skipped_steps_the_first_is_kept(tmp_path):
    written, there = skipping_run(tmp_path, {3, 4, 5})
    assert written == [3]
    assert there == ["step-000000000004"]


def test_the_first_two_capsules_and_the_newest_stay(tmp_path):
    written, there = skipping_run(tmp_path, {1, 3, 5, 7, 9})
    assert written == [1, 3, 5, 7, 9]
    assert there == ["step-000000000002", "step-000000000004", "step-000000000010"]


def test_an_overflow_of_the_loss_scale_is_kept_once_and_recognised(tmp_path):
    state = TrainState.create(
        nn.Linear(1, 1),
        Optimizer(torch.optim.SGD, lr=0.1),
        precision="fp16",
        loss_scale=LossScale(scale=2.0**30, growth_interval=1),
    )
    writer, paths = CapsuleWriter(tmp_path), []
    for _ in range(40):
        x = torch.ones(1, 1)
        after = forward_loss(state, x, lambda m, x: m(x).float().mean())
        after = optimizer_step(unscale_and_clip(backward_scaled(after), max_norm=1.0))
        look = writer.after_step(state, after, x)
        paths.append(None if look is None else look.capsule)
        state = after
    assert sum(path is not None for path in paths) == 1


def test_an_overflow_is_told_from_a_failure(tmp_path):
    (path,), _ = explode(
        tmp_path / "overflow", at=1000, precision="fp16", loss_scale=2.0**30, steps=2, epochs=1
    )
    again = replay(path)
    assert again.overflow
    assert again.finding.backward
    (path,), _ = explode(tmp_path / "failure", at=1, precision="fp16", steps=2, epochs=1)
    again = replay(path)
    assert not again.overflow
    assert again.finding.module == "body.normalise"


def test_a_capsule_that_cannot_be_written_is_reported_once_and_the_run_goes_on(tmp_path):
    (tmp_path / "capsules").write_text("in the way")
    state = TrainState.create(nn.Linear(2, 1), Optimizer(torch.optim.SGD, lr=0.1))
    told = []
    writer = CapsuleWriter(tmp_path, report=told.append)
    for value in (math.nan, 1.0, math.nan):
        x = torch.full((1, 2), value)
        after = forward_loss(state, x, lambda m, x: m(x).mean())
        after = optimizer_step(unscale_and_clip(backward_scaled(after), max_norm=1.0))
        look = writer.after_step(state, after, x)
        assert look is None if value == 1.0 else look.capsule is None
        state = after
    assert len(told) == 1
    assert told[0].startswith("The step that was not finite could not be kept for steploop replay: ")


@pytest.mark.parametrize(
    "batch",
    [
        (torch.ones(2), [torch.zeros(1, dtype=torch.int64), None], {"a": 1.5, "b": "text", 3: True}),
        torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        {"inf": math.inf, "x": torch.tensor(math.nan)},
    ],
)
def test_a_batch_comes_back_as_it_was(tmp_path, batch):
    state = TrainState.create(nn.Linear(2, 1), Optimizer(torch.optim.SGD, lr=0.1))
    after = forward_loss(state, None, lambda m, _: m(torch.full((1, 2), math.nan)).mean())
    after = optimizer_step(unscale_and_clip(backward_scaled(after), max_norm=1.0))
    path = CapsuleWriter(tmp_path).after_step(state, after, batch).capsule
    read = read_capsule(path).batch
    assert first_difference(read, batch) is None
    if isinstance(batch, torch.Tensor):
        assert read.stride() == batch.stride()


def test_a_batch_of_the_users_own_type_is_read_from_the_data_again(tmp_path):
    @attrs.frozen
    class Pair:
        x: torch.Tensor

    state = TrainState.create(nn.Linear(2, 1), Optimizer(torch.optim.SGD, lr=0.1))
    after = forward_loss(state, None, lambda m, _: m(torch.full((1, 2), math.nan)).mean())
    after = optimizer_step(unscale_and_clip(backward_scaled(after), max_norm=1.0))
    path = CapsuleWriter(tmp_path).after_step(state, after, Pair(torch.ones(1))).capsule
    capsule = read_capsule(path)
    assert capsule.batch is None
    assert (
        capsule.about["batch_missing"]
        == "a batch that holds a Pair is read from the data again, at its cursor"
    )


def test_a_capsule_without_its_batch_is_replayed_from_the_data(tmp_path):
    (path,), _ = explode(tmp_path, where="forward")
    about = json.loads((path / "capsule.json").read_text())
    (path / "capsule.json").write_text(json.dumps({**about, "structure": None}))
    (path / "batch.safetensors").unlink()
    assert replay(path).finding.module == "body.normalise"


def test_what_is_no_capsule_is_refused_with_the_nearest_one(tmp_path):
    (path,), _ = explode(tmp_path, where="forward")
    with pytest.raises(ConfigError) as caught:
        replay(tmp_path)
    assert (
        str(caught.value)
        == f"{tmp_path} is no capsule: it holds no capsule.json. Give one of its capsules, such as {path}."
    )
    with pytest.raises(ConfigError, match="Every step of a run without capsules/ was finite"):
        replay(tmp_path / "nothing")


def test_a_damaged_capsule_is_refused(tmp_path):
    (path,), _ = explode(tmp_path, where="forward")
    whole = (path / "capsule.json").read_text()
    (path / "capsule.json").write_text(whole.replace('"format": 1', '"format": 9'))
    with pytest.raises(DataError, match="of format 9, but this version reads 1"):
        replay(path)
    (path / "capsule.json").write_text(whole[:-40])
    with pytest.raises(DataError, match=r"capsule\.json is not the JSON that a run writes"):
        replay(path)
    (path / "capsule.json").write_text(whole)
    weights = path / "state" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointDamagedError):
        replay(path)


def test_a_step_that_is_finite_here_is_said_to_be(tmp_path):
    (path,), _ = explode(tmp_path, where="forward")
    tamed = (path / "recipe.py").read_text().replace("keepdim=True).sqrt()", "keepdim=True).add(1.0).sqrt()")
    (path / "recipe.py").write_text(tamed)
    again = replay(path)
    assert again.finding is None
    assert not again.reproduced


def test_a_parameter_that_was_broken_before_the_step_is_named(tmp_path):
    (path,), _ = explode(tmp_path, where="forward")
    _, _, recipe = build(where="forward")
    state = checkpoint.load(path / "state", like=recipe.state)
    with torch.no_grad():
        state.params["body.head.weight"][0, 0] = math.inf
    checkpoint.save(state, path / "state", overwrite=True, require_finite=False)
    finding = replay(path).finding
    assert (finding.phase, finding.module) == ("state", "body.head")
    assert finding.what.startswith("body.head.weight was not finite before the step began")


def judged(model, x, objective=None):
    """The finding for one step of a model on one batch."""
    state = TrainState.create(model, Optimizer(torch.optim.SGD, lr=0.1))
    objective = objective or (lambda m, x: m(x).square().mean())
    watch = StepWatch({"": state.model})
    with watch:
        after = forward_loss(state, x, objective)
        after = optimizer_step(unscale_and_clip(backward_scaled(after), max_norm=1.0))
    assert after.finite is False
    return judge(watch, x, loss_finite=bool(torch.isfinite(after.loss)))


def test_a_batch_that_is_not_finite_is_blamed_itself():
    finding = judged(nn.Linear(2, 1), torch.tensor([[1.0, math.nan]]))
    assert finding.phase == "batch"
    assert finding.came_out[0].nan == 1


class Masked(nn.Module):
    """Attention weights with a mask of -inf, and a logarithm of what is left."""

    def __init__(self):
        super().__init__()
        self.scores = nn.Linear(3, 3)
        self.softmax = nn.Softmax(dim=-1)
        self.log = Log()

    def forward(self, x):
        masked = self.scores(x).masked_fill(torch.tensor([False, True, False]), -math.inf)
        return self.log(self.softmax(masked))


class Log(nn.Module):
    def forward(self, x):
        return x.log()


def test_a_mask_of_minus_infinity_that_a_softmax_takes_up_is_not_blamed():
    finding = judged(Masked(), torch.ones(1, 3))
    assert (finding.phase, finding.module) == ("forward", "log")


class Shortcut(nn.Module):
    """Two ways from one input: a harmless one beside one whose backward pass is infinite."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 2, bias=False)
        self.harmless = nn.Linear(2, 2)
        self.root = Root()

    def forward(self, x):
        x = self.first(x)
        return self.harmless(x) + self.root(x)


class Root(nn.Module):
    def forward(self, x):
        return x.abs().sqrt()


def test_a_module_beside_the_culprit_on_the_same_input_is_not_blamed():
    finding = judged(Shortcut(), torch.zeros(1, 2), lambda m, x: m(x).sum())
    assert (finding.phase, finding.module) == ("backward", "root")


def test_gradients_whose_norm_overflows_are_told_apart():
    finding = judged(nn.Linear(2, 2), torch.full((1, 2), 1e30), lambda m, x: (m(x) * 1e5).sum())
    assert finding.phase == "norm"


def test_inplace_layers_and_attention_can_be_watched():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.BatchNorm1d(4), Log())
    assert judged(model, torch.ones(2, 4)).module == "3"
    layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=8, batch_first=True)
    assert judged(nn.Sequential(layer, Log()), torch.ones(1, 3, 4)).module == "1"


def test_watching_changes_no_bit_of_the_step():
    def step(*, watched):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(4, 8), nn.Dropout(0.5), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        )
        state = TrainState.create(model, Optimizer(torch.optim.AdamW, lr=0.1))
        x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
        watch = StepWatch({"": state.model}) if watched else None
        if watch:
            watch.__enter__()
        after = forward_loss(state, x, lambda m, x: m(x).square().mean())
        after = optimizer_step(unscale_and_clip(backward_scaled(after), max_norm=1.0))
        if watch:
            watch.__exit__(None, None, None)
        return after

    assert first_difference(step(watched=True).params, step(watched=False).params) is None


def test_statistics_of_a_tensor():
    seen = stats_of("x", torch.tensor([[1.0, 3.0, 0.0], [math.nan, math.inf, -math.inf]]))
    assert (seen.nan, seen.pos_inf, seen.neg_inf, seen.zeros) == (1, 1, 1, 1)
    assert (seen.low, seen.high) == (0.0, 3.0)
    assert seen.mean == pytest.approx(4 / 3)
    assert str(seen) == "x (2, 3) float32, 0 to 3, mean 1.333, std 1.247, 1 zeros, 1 nan, 1 inf, 1 -inf"
    assert stats_of("y", torch.tensor([math.nan])).low is None
