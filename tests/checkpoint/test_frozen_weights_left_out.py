"""Frozen parameters are left out of checkpoints on request: small files, the same training, and no other base weights."""

import attrs
import pytest
import torch
from running import changed, lines, train
from safetensors.torch import load_file
from torch import nn

from steploop import (
    Optimizer,
    TrainState,
    backward_scaled,
    checkpoint,
    forward_loss,
    optimizer_step,
    unscale_and_clip,
    update_ema,
)
from steploop.checkpoint import left_out
from steploop.checkpoint.weight_export import export_weights
from steploop.errors import CheckpointDamagedError, CheckpointIncompatibleError
from steploop.runs.from_python import run
from steploop.tools.cli import call


class Adapted(nn.Module):
    """A large frozen layer, and small ones beside it that are trained."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(64, 64)
        self.down, self.up = nn.Linear(64, 2, bias=False), nn.Linear(2, 64, bias=False)
        self.base.requires_grad_(requires_grad=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def a_state(seed=0, **options):
    torch.manual_seed(seed)
    return TrainState.create(Adapted(), Optimizer(torch.optim.AdamW, lr=0.01), **options)


def step(state, n):
    batch = torch.randn(4, 64, generator=torch.Generator().manual_seed(n))
    state = forward_loss(state, batch, lambda model, x: (model(x) - x).square().mean())
    state = optimizer_step(unscale_and_clip(backward_scaled(state), max_norm=1.0))
    return update_ema(state, decay=0.9) if state.ema is not None else state


def size(folder):
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.mark.parametrize("ema", [False, True])
def test_training_goes_on_to_the_same_bits_from_a_small_checkpoint(ema, tmp_path):
    whole, state = a_state(ema=ema), a_state(ema=ema)
    for n in range(6):
        whole = step(whole, n)
    for n in range(3):
        state = step(state, n)
    checkpoint.save(state, tmp_path / "full")
    checkpoint.save(state, tmp_path / "small", frozen=False)
    assert size(tmp_path / "small") < size(tmp_path / "full") / 2
    assert set(load_file(tmp_path / "small" / "model.safetensors")) == {"down.weight", "up.weight"}
    before = checkpoint.digest(like := a_state(ema=ema))
    loaded = checkpoint.load(tmp_path / "small", like=like)
    assert checkpoint.digest(loaded) == checkpoint.digest(state)
    for n in range(3, 6):
        loaded = step(loaded, n)
    assert checkpoint.digest(loaded) == checkpoint.digest(whole)
    assert checkpoint.digest(like) == before


def test_other_frozen_weights_are_refused_by_name(tmp_path):
    checkpoint.save(a_state(), tmp_path / "small", frozen=False)
    with pytest.raises(
        CheckpointIncompatibleError,
        match=r"base\.bias was left out of the checkpoint, and it has other values here",
    ):
        checkpoint.load(tmp_path / "small", like=a_state(1))
    other = a_state()
    with torch.no_grad():
        other.params["base.bias"][5] += 1
    with pytest.raises(CheckpointIncompatibleError, match=r"base\.bias was left out"):
        checkpoint.load(tmp_path / "small", like=other)
    sequential = TrainState.create(nn.Linear(2, 2), Optimizer(torch.optim.AdamW, lr=0.1))
    with pytest.raises(CheckpointIncompatibleError, match="this state has no such parameter"):
        checkpoint.load(tmp_path / "small", like=sequential)
    with pytest.raises(CheckpointDamagedError):
        left_out.taken_from(other, {"base.bias": 3}, {})


def test_an_average_that_is_not_the_frozen_weight_is_kept(tmp_path):
    state = a_state(ema=True)
    with torch.no_grad():
        state.ema["base.bias"].zero_()
    checkpoint.save(state, tmp_path / "small", frozen=False)
    loaded = checkpoint.load(tmp_path / "small", like=a_state(ema=True))
    assert not loaded.ema["base.bias"].any()
    assert torch.equal(loaded.ema["base.weight"], loaded.params["base.weight"])


def test_the_digest_of_a_frozen_weight_is_computed_once(tmp_path, monkeypatch):
    state = step(a_state(), 0)
    checkpoint.save(state, tmp_path / "a", frozen=False)
    monkeypatch.setattr(left_out.hashlib, "sha256", None)
    assert left_out.frozen_digests(step(state, 1))


def test_a_module_that_is_frozen_later_or_thawed_is_named(tmp_path):
    checkpoint.save(a_state(), tmp_path / "small", frozen=False)
    torch.manual_seed(0)
    thawed = TrainState.create(Adapted().requires_grad_(), Optimizer(torch.optim.AdamW, lr=0.01))
    with pytest.raises(
        CheckpointIncompatibleError,
        match=r"parameter base\.weight: frozen in the checkpoint, but trained here",
    ):
        checkpoint.load(tmp_path / "small", like=thawed)


def test_an_export_says_that_weights_were_left_out_and_writes_the_others_on_request(tmp_path):
    checkpoint.save(a_state(), tmp_path / "small", frozen=False)
    opened = checkpoint.open_checkpoint(tmp_path / "small")
    with pytest.raises(
        CheckpointIncompatibleError, match=r"saved without its 2 frozen parameters \(base\.weight, \.\.\.\)"
    ):
        export_weights(opened, tmp_path / "w.safetensors")
    assert export_weights(opened, tmp_path / "w.safetensors", partial=True) == 2
    assert (
        Adapted().load_state_dict(load_file(tmp_path / "w.safetensors"), strict=False).unexpected_keys == []
    )
    state = checkpoint.load_weights(tmp_path / "small", into=a_state(5), partial=["base.*"])
    assert torch.equal(state.params["up.weight"], a_state().params["up.weight"])


def test_a_recipe_leaves_them_out_of_its_runs(tmp_path, capsys):
    def change(recipe, config):
        recipe.state.model[0].requires_grad_(requires_grad=False)
        torch.manual_seed(config.seed)
        state = TrainState.create(recipe.state.model, Optimizer(torch.optim.AdamW, lr=0.1), ema=True)
        return attrs.evolve(recipe, state=state, save_frozen=False)

    recipe = changed(tmp_path, change)
    values = {"precision": "fp32"}
    train(tmp_path / "whole", values, recipe=recipe)
    train(tmp_path / "run", values, recipe=recipe, stop_at=5)
    run(resume=tmp_path / "run", device="cpu", progress="none")
    newest = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert "0.weight" not in load_file(newest / "model.safetensors")
    assert call(["diff", str(tmp_path / "run"), str(tmp_path / "whole")]) == 0
    assert call(["inspect", str(newest)]) == 0
    capsys.readouterr()
    metrics = [
        [line["metrics"] for line in lines(tmp_path / out) if line["kind"] == "eval"]
        for out in ("run", "whole")
    ]
    assert metrics[0] == metrics[1]
