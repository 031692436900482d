"""Numbers that are not: steps, parameters, metrics and loss scales, and steps that do not fit.

What these would catch: a save that looks at gradients and not at parameters, or at buffers too; a best model of nan; a
loss scale that collapses to 0; an allocation that fails and leaves a half of a step behind.
"""

import json
import math

import attrs
import pytest
import torch
from checkpoint_helpers import listed, make_linear
from points_recipe import objective
from running import changed, digest, hidden, lines, steps, train
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from steploop import (
    LossScale,
    Optimizer,
    TrainState,
    accumulate,
    backward_scaled,
    checkpoint,
    evaluate,
    forward_loss,
    optimizer_step,
    schedule,
    unscale_and_clip,
)
from steploop.checkpoint import BackgroundSaver, CheckpointStore
from steploop.errors import NonFiniteError, OutOfMemoryError, SpentStateError
from steploop.tools.cli import call

INF, NAN = math.inf, math.nan
QUICK = ["--no-tune", "--device", "cpu", "--quiet", "--checkpoint-every", "1", "--log-every", "1"]


@pytest.fixture
def everything_kept(monkeypatch):
    """No checkpoint is deleted, so that all of them can be looked at."""
    monkeypatch.setattr(CheckpointStore, "_prune", lambda store: None)


def nonfinite_tensors(out):
    """(file, tensor) of every value that is not finite in any safetensors file below the checkpoints of a run."""
    return [
        (str(path.relative_to(out)), name)
        for path in (out / "checkpoints").rglob("*.safetensors")
        for name, tensor in load_file(path).items()
        if tensor.is_floating_point() and not tensor.isfinite().all()
    ]


# -- no checkpoint ever holds a parameter that is not finite --------------------------------------------------------------


def spoiled_batch(value):
    """The inputs of one step hold a value, which makes its loss and its gradients not finite."""

    def change(recipe, at):
        def train_step(state, batch):
            x, y = batch
            if state.attempted_steps == at:
                x = torch.full_like(x, value)
            return recipe.train_step(state, (x, y))

        return attrs.evolve(recipe, train_step=train_step)

    return change


def overflowing(recipe, at):
    """The gradients of one step are finite, and its update is not: weight decay times the largest rate there is."""

    def train_step(state, batch):
        state = schedule(state, lambda _: 3e38 if state.attempted_steps == at else 1e-3)
        return taken(state, batch, objective)

    optimizer = Optimizer(torch.optim.SGD, lr=1e-3, weight_decay=100.0)
    state = TrainState.create(recipe.state.model, optimizer, ema=True)
    return attrs.evolve(recipe, state=state, train_step=train_step)


def meddling(value):
    """A step of the user's own writes into a parameter."""

    def change(recipe, at):
        def train_step(state, batch):
            state = recipe.train_step(state, batch)
            if state.attempted_steps == at + 1:
                with torch.no_grad():
                    state.params["0.bias"][3] = value
            return state

        return attrs.evolve(recipe, train_step=train_step)

    return change


def taken(state, batch, objective):
    state = unscale_and_clip(backward_scaled(forward_loss(state, batch, objective)), max_norm=1.0)
    return optimizer_step(state, max_nonfinite_steps=500)


@pytest.mark.usefixtures("everything_kept")
@pytest.mark.parametrize("at", [0, 4, 6, 13])
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_that_is_not_finite_is_counted_and_no_checkpoint_holds_its_numbers(
    value, at, precision, tmp_path
):
    """The first step, one within an epoch, the last of an epoch, the last of all."""
    recipe = changed(tmp_path, lambda made, _: spoiled_batch(value)(made, at))
    summary = train(tmp_path / "run", {"precision": precision}, recipe=recipe, checkpoint_every=1)
    assert (summary.state, summary.steps_attempted) == ("finished", 14)
    # those that were applied, and the start where nothing was; fp16 finds its scale by skipping
    assert steps(tmp_path / "run") == list(range(at > 0, summary.steps_applied + 1))
    assert summary.steps_skipped == 1 or precision == "fp16"
    assert nonfinite_tensors(tmp_path / "run") == []
    skipped = [line for line in lines(tmp_path / "run") if line.get("event") == "skipped"]
    assert at + 1 in [line["attempted"] for line in skipped]


@pytest.mark.usefixtures("everything_kept")
@pytest.mark.parametrize("at", [0, 4, 6, 13])
@pytest.mark.parametrize(
    "spoil", [overflowing, meddling(NAN), meddling(-INF)], ids=["overflow", "nan", "-inf"]
)
def test_a_parameter_that_is_not_finite_ends_the_run_with_code_5_and_is_never_saved(
    spoil, at, tmp_path, capsys
):
    """Its gradients were: it is found when the state is saved, and the checkpoints before it stay."""
    out, recipe = tmp_path / "run", changed(tmp_path, lambda made, _: spoil(made, at))
    assert call(["run", recipe, "--out", str(out), "--set", "precision=fp32", *QUICK]) == 5
    err = capsys.readouterr().err
    name = "0.weight" if spoil is overflowing else "0.bias"
    assert f"The parameter {name!r} is not finite" in err
    assert f"after step {at + 1}. " in err
    assert len(err.splitlines()) == 1
    assert steps(out) == list(range(1, at + 1))
    assert hidden(out) == []
    assert nonfinite_tensors(out) == []
    status = json.loads((out / "status.json").read_bytes())
    assert (status["state"], status["exit_code"]) == ("failed", 5)


def test_the_run_goes_on_from_before_once_the_cause_is_gone(tmp_path):
    """The step after the one that overflowed is kept for a replay, with the parameters that it began with."""
    at = [5]
    recipe = changed(tmp_path, lambda made, _: overflowing(made, at[0]))
    with pytest.raises(NonFiniteError):
        train(tmp_path / "run", {"precision": "fp32"}, recipe=recipe, checkpoint_every=2)
    assert [path.name for path in (tmp_path / "run" / "capsules").iterdir()] == ["step-000000000007"]
    at[0] = -1
    assert train(tmp_path / "run", resume=True).state == "finished"
    train(tmp_path / "whole", {"precision": "fp32"}, recipe=recipe)
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")


class Masked(nn.Module):
    """A mask of -inf, as attention adds it; a frozen parameter of inf; a trained one."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.full((3,), -INF))
        self.frozen = nn.Parameter(torch.full((2,), INF), requires_grad=False)
        self.weight = nn.Parameter(torch.ones(3))
        self.complex = nn.Parameter(torch.ones(2, dtype=torch.complex64))
        self.empty = nn.Parameter(torch.ones(0))

    def forward(self, x):
        return (x * self.weight).sum() + self.complex.abs().sum()


def masked():
    return TrainState.create(Masked(), Optimizer(torch.optim.SGD, lr=0.1))


def test_only_trained_parameters_have_to_be_finite(tmp_path):
    """Buffers and frozen parameters may hold what the model needs."""
    checkpoint.save(masked(), tmp_path / "a")
    assert torch.equal(load_file(tmp_path / "a" / "model.safetensors")["mask"], torch.full((3,), -INF))
    loaded = checkpoint.load(tmp_path / "a", like=masked())
    assert torch.equal(loaded.buffers["mask"], torch.full((3,), -INF))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("name", ["weight", "complex"])
def test_a_save_refuses_a_parameter_that_is_not_finite_with_nothing_written(name, value, tmp_path):
    """In the background too, where the error reaches the next save; and one may insist."""
    state = masked()
    with torch.no_grad():
        state.params[name][1] = value
    said = rf"The parameter '{name}' is not finite \(1 of its \d values\), after step 0\."
    with pytest.raises(NonFiniteError, match=said) as caught:
        checkpoint.save(state, tmp_path / "a")
    assert caught.value.exit_code == 5
    saver = BackgroundSaver()
    saver.save(state, tmp_path / "a")
    with pytest.raises(NonFiniteError, match=said):
        saver.wait()
    with pytest.raises(NonFiniteError, match=rf"The parameter 'second.{name}' is"):
        checkpoint.save({"first": masked(), "second": state}, tmp_path / "a")
    assert listed(tmp_path) == []
    digest = checkpoint.save(state, tmp_path / "a", require_finite=False)
    assert digest == checkpoint.digest(state)
    saver.save(state, tmp_path / "b", require_finite=False)
    assert saver.wait() == digest
    assert checkpoint.digest(checkpoint.load(tmp_path / "a", like=masked())) == digest


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex128]
)
def test_large_parameters_are_finite_though_their_sum_is_not(dtype, tmp_path):
    """What is quick to compute is only a reason to look closer."""
    largest = torch.finfo(dtype).max
    model = nn.ParameterDict({"w": nn.Parameter(torch.full((4,), largest, dtype=dtype))})
    state = TrainState.create(model, Optimizer(torch.optim.SGD, lr=0.1))
    checkpoint.save(state, tmp_path / "a")
    with torch.no_grad():
        state.params["w"][:2] = torch.tensor([INF, -INF])
    with pytest.raises(NonFiniteError, match=r"'w' is not finite \(2 of its 4 values\)"):
        checkpoint.save(state, tmp_path / "b")


# -- metrics and loss scale ------------------------------------------------------------------------------------------------


def test_a_best_of_nan_is_none_and_patience_runs_out(tmp_path):
    """Through the run: all of its evaluations give nan."""
    recipe = changed(
        tmp_path, lambda made, _: attrs.evolve(made, evaluate=lambda _: {"loss": NAN, "accuracy": None})
    )
    summary = train(tmp_path / "run", {"patience": "1", "epochs": "5"}, recipe=recipe)
    assert (summary.epoch, summary.best, summary.metrics) == (1, None, {"loss": None, "accuracy": None})
    status = json.loads((tmp_path / "run" / "status.json").read_bytes())
    assert (status["ending"], status["best"]) == ("early_stop", None)
    assert "best_checkpoint" not in status


def explosive(model, batch):
    return model(batch).sum() * INF


def test_a_loss_scale_stays_at_its_floor_and_the_next_finite_step_is_one():
    """Without a floor it is 0 after 166 overflows, and the next finite step writes nan."""
    torch.manual_seed(0)
    state = TrainState.create(nn.Linear(3, 1), Optimizer(torch.optim.SGD, lr=0.1), precision="fp16")
    batch = torch.ones(2, 3)
    for _ in range(170):
        state = taken(state, batch, explosive)
    assert (state.scale.scale, state.step) == (1.0, 0)
    state = taken(state, batch, lambda model, x: model(x).float().mean())
    assert state.step == 1
    assert all(p.isfinite().all() for p in state.params.values())


def test_a_scale_at_its_floor_ends_the_run_as_any_step_that_is_not_finite(tmp_path, capsys):
    words = ["--set", "explode_at=2", "--out", str(tmp_path / "run"), *QUICK]
    low = lambda made, _: attrs.evolve(made, state=made.state.replace(scale=LossScale(scale=1.0)))  # noqa: E731
    assert call(["run", changed(tmp_path, low), *words]) == 5
    assert "3 steps in a row had gradients that were not finite (limit 3)" in capsys.readouterr().err
    assert "loss scale 1." in json.loads((tmp_path / "run" / "status.json").read_bytes())["error"]
    assert nonfinite_tensors(tmp_path / "run") == []


@pytest.mark.parametrize("bound", [{"max_norm": 1.0}, {"max_value": 0.1}, {"adaptive": 0.01}], ids=str)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_norm_that_is_not_finite_rescales_nothing_and_nothing_is_stepped_on(bound, value):
    """Of [inf, 1, 1] torch makes [nan, 0, 0], which a step would take for small gradients and a nan."""
    begun = make_linear(0)
    state = forward_loss(
        begun, torch.ones(3), lambda model, x: (model.weight * x).sum() + value * model.bias[0]
    )
    state = backward_scaled(state)
    before = {name: grad.clone() for name, grad in state.grads.items()}
    clipped = unscale_and_clip(state, **bound)
    assert clipped.finite is False
    if "max_norm" in bound:  # the others bound each number, or each row, by itself
        assert torch.equal(clipped.grads["weight"], before["weight"])
    after = optimizer_step(clipped)
    assert (after.step, after.nonfinite_steps) == (0, 1)
    unmoved = after.replace(attempted_steps=0, batch=0, nonfinite_steps=0)
    assert checkpoint.digest(unmoved) == checkpoint.digest(make_linear(0))


# -- memory -------------------------------------------------------------------------------------------------------------


def from_torch():
    torch.empty(2**60)


def from_python():
    raise MemoryError


def from_cuda():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class Greedy(torch.autograd.Function):
    """Fits going forward and not going back."""

    @staticmethod
    def forward(ctx, x, fail):
        ctx.fail = fail
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.fail()
        return grad, None


@pytest.mark.parametrize("fail", [from_torch, from_python, from_cuda])
@pytest.mark.parametrize("where", ["forward", "backward", "accumulate", "evaluate"])
def test_out_of_memory_is_one_error_and_the_next_step_is_as_if_nothing_had_been(where, fail):
    """The state is whole, and so is what the model holds."""

    def greedy(model, batch):
        if where == "backward":
            return Greedy.apply(model(batch), fail).sum()
        if len(batch) == 2:
            fail()
        return model(batch).sum()

    fine = lambda model, batch: model(batch).square().mean()  # noqa: E731
    state, small, large = make_linear(0), torch.ones(3, 3), torch.ones(2, 3)
    state = taken(state, small, fine)
    before = checkpoint.digest(state)
    act = {
        "forward": lambda: forward_loss(state, large, greedy),
        "backward": lambda: backward_scaled(forward_loss(state, large, greedy)),
        "accumulate": lambda: accumulate(state, [small, large], greedy),
        "evaluate": lambda: evaluate(state, [small, large], greedy),
    }[where]
    with pytest.raises(OutOfMemoryError) as caught:
        act()
    if where != "backward":
        assert "(2, 3) float32" in str(caught.value)
    assert checkpoint.digest(state) == before
    assert all(p.grad is None for p in state.model.parameters())
    expected = taken(taken(make_linear(0), small, fine), small, fine)
    assert checkpoint.digest(taken(state, small, fine)) == checkpoint.digest(expected)


class Full(TorchDispatchMode):
    """No memory any more for some operations of an optimizer, from the ``nth`` on."""

    def __init__(self, operation, nth):
        super().__init__()
        self.operation, self.left = operation, nth

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is self.operation:
            self.left -= 1
            if self.left < 0:
                from_torch()
        return function(*args, **(kwargs or {}))


ADAM = Optimizer(torch.optim.AdamW, lr=0.1)
MOMENTUM = Optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)


@pytest.mark.parametrize("nth", [0, 1, 3])
def test_the_first_update_that_does_not_fit_leaves_the_state_as_it_was(nth):
    """It makes the slots, which is where memory runs out; those that it had made are gone again."""
    batch, fine = torch.ones(3, 3), lambda model, x: model(x).square().mean()
    state = make_linear(0, optimizer=ADAM)
    before = checkpoint.digest(state)
    with (
        pytest.raises(OutOfMemoryError, match=r"AdamW did not fit .* of cpu\. The state is as it was"),
        Full(torch.ops.aten.zeros_like.default, nth),
    ):
        taken(state, batch, fine)
    assert checkpoint.digest(state) == before
    expected = checkpoint.digest(taken(make_linear(0, optimizer=ADAM), batch, fine))
    assert checkpoint.digest(taken(state, batch, fine)) == expected


@pytest.mark.parametrize(
    ("optimizer", "operation", "steps"),
    [
        (MOMENTUM, torch.ops.aten.clone.default, 0),  # the second parameter's, when the first was updated
        (ADAM, torch.ops.aten.sqrt.default, 1),
        (Optimizer(torch.optim.AdamW, lr=0.1, foreach=True), torch.ops.aten._foreach_sqrt.default, 1),
    ],
    ids=["SGD", "AdamW", "AdamW, foreach"],
)
def test_an_update_that_was_cut_off_half_way_spends_the_state(optimizer, operation, steps):
    """Nobody trains on it by mistake; without donation the state before it is whole."""
    batch, fine = torch.ones(3, 3), lambda model, x: model(x).square().mean()
    state = make_linear(0, optimizer=optimizer)
    for _ in range(steps):
        state = taken(state, batch, fine)
    whole = state.clone()
    with (
        pytest.raises(OutOfMemoryError, match="It was cut off half-way: this state is spent"),
        Full(operation, 1 - steps),
    ):
        taken(state, batch, fine)
    assert not state.alive
    with pytest.raises(
        SpentStateError, match=f"an update was cut off in the middle of attempted step {steps}, and"
    ):
        forward_loss(state, batch, fine)
    ready = unscale_and_clip(backward_scaled(forward_loss(whole, batch, fine)), max_norm=1.0)
    before = checkpoint.digest(whole)
    with pytest.raises(OutOfMemoryError), Full(operation, 1 - steps):
        optimizer_step(ready, donate=False)
    assert checkpoint.digest(whole) == before
    assert taken(whole, batch, fine).step == steps + 1


def test_any_other_error_of_an_optimizer_spends_the_state_too():
    """A rate that torch cannot convert, a hook of the user's: it comes out as it is, and nothing goes on from there."""
    batch, fine = torch.ones(3, 3), lambda model, x: model(x).square().mean()
    state = taken(make_linear(0), batch, fine)

    def failing(*_):
        raise ZeroDivisionError

    state.machine.optimizer.register_step_post_hook(failing)
    with pytest.raises(ZeroDivisionError):
        taken(state, batch, fine)
    with pytest.raises(SpentStateError, match="an update was cut off in the middle of attempted step 1"):
        checkpoint.digest(state)


def test_a_run_that_runs_out_of_memory_says_so_in_one_sentence(tmp_path, capsys):

    def change(recipe, _):
        def train_step(state, batch):
            if state.attempted_steps == 5:
                forward_loss(state, batch, lambda model, batch: torch.empty(2**60))
            return recipe.train_step(state, batch)

        return attrs.evolve(recipe, train_step=train_step)

    assert call(["run", changed(tmp_path, change), "--out", str(tmp_path / "run"), *QUICK]) == 1
    err = capsys.readouterr().err
    assert "A step did not fit into the memory of cpu: the batch holds (4, 6) float32, (4,) int64" in err
    assert "Traceback" not in err
    assert steps(tmp_path / "run") == [3, 4, 5]
