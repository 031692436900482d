"""Gradient norms per layer group: right where they are asked for, absent where they are not."""

import math

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
from steploop.errors import ConfigError
from steploop.runs.layer_norms import LayerNorms, group_of, layer_norms


def a_state():
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("body", nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4)))
    model.add_module("head", nn.Linear(4, 2))
    return TrainState.create(model, Optimizer(torch.optim.AdamW, lr=0.1, no_decay=["*.bias"]))


def gradients_of(state, scale=1.0):
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    return unscale_and_clip(
        backward_scaled(forward_loss(state, x, lambda m, x: scale * m(x).square().mean())), max_norm=math.inf
    )


def step(state, scale=1.0):
    return optimizer_step(gradients_of(state, scale))


@pytest.mark.parametrize(
    ("name", "depth", "group"),
    [
        ("body.0.weight", 1, "body"),
        ("body.0.weight", 2, "body.0"),
        ("body.0.weight", 9, "body.0"),
        ("scale", 1, "(root)"),
    ],
)
def test_a_group_is_the_beginning_of_the_name_of_the_module(name, depth, group):
    assert group_of(name, depth) == group


def test_the_norms_are_those_of_the_gradients_together():
    state = gradients_of(a_state())
    norms = layer_norms(state.grads)
    assert list(norms) == ["body", "head"]
    for group, norm in norms.items():
        flat = torch.cat([g.flatten() for name, g in state.grads.items() if name.startswith(group + ".")])
        assert norm.item() == pytest.approx(flat.norm().item())
    whole = math.sqrt(sum(norm.item() ** 2 for norm in norms.values()))
    assert whole == pytest.approx(float(state.grad_norm))


def test_the_hook_reads_what_the_optimizer_was_given():
    expected = {k: v.item() for k, v in layer_norms(gradients_of(a_state()).grads, depth=2).items()}
    state = a_state()
    with LayerNorms(state, depth=2) as norms:
        norms.request()
        state = step(state)
        assert norms.read() == pytest.approx(expected)
        step(state)
        assert norms.read() == pytest.approx(expected)  # nothing was requested for the second step


def test_watching_changes_no_bit_of_the_step():
    plain, state = step(a_state()), a_state()
    with LayerNorms(state) as norms:
        norms.request()
        watched = step(state)
    assert checkpoint.digest(watched) == checkpoint.digest(plain)


def test_a_skipped_step_has_no_norms():
    state = a_state()
    with LayerNorms({"generator": state}) as norms:
        norms.request()
        state = step(state, scale=math.nan)
        assert norms.read() == {}
        norms.request()
        step(state)
        assert list(norms.read()) == ["generator.body", "generator.head"]


def test_there_is_no_hook_outside_of_it():
    state = a_state()
    hooks = state.machine.optimizer._optimizer_step_pre_hooks
    assert not hooks
    with LayerNorms(state):
        assert len(hooks) == 1
    assert not hooks


def test_a_depth_below_one_is_refused():
    with pytest.raises(ConfigError, match="depth must be an integer >= 1, but is 0"):
        layer_norms({}, depth=0)
    with pytest.raises(ConfigError, match="depth must be an integer >= 1, but is 0"):
        LayerNorms(a_state(), depth=0)
