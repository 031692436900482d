"""What a run goes on with after a load: its rates, the environment it was written in, odd tensors.

What these would catch: a schedule that counts from the resume on, a momentum or a second group that is left behind, a key
of the environment that nobody compares, a layout that is stored and not restored.
"""

import json
import os
from functools import partial, reduce

import pytest
import torch
from checkpoint_helpers import bits, listed, make_linear
from test_storage_tensors import DTYPES, LOOSE, ZOO, random_bits, unsupported
from torch import nn
from torch.optim import lr_scheduler

from steploop import (
    Optimizer,
    ReduceLROnPlateau,
    TrainState,
    backward_scaled,
    checkpoint,
    constant,
    cosine_annealing,
    forward_loss,
    from_torch,
    one_cycle,
    optimizer_step,
    schedule,
    step_lr,
    unscale_and_clip,
    warmup_cosine,
    warmup_stable_decay,
)
from steploop.checkpoint import InexactResumeWarning
from steploop.checkpoint.format.sealing import seal
from steploop.checkpoint.provenance import _EXACT
from steploop.core.trees import first_difference
from steploop.errors import CheckpointIncompatibleError, CheckpointUnsupportedError, ConfigError

STEPS = 9
BATCHES = [torch.full((2, 3), 1.0 + n) for n in range(STEPS)]
PLATEAU = ReduceLROnPlateau(lr=0.1, patience=1, factor=0.5)
SCHEDULES = {
    "constant": constant(0.1),
    "step_lr": step_lr(0.1, step_size=2, gamma=0.3),
    "cosine_annealing": cosine_annealing(0.1, total_steps=7),
    "one_cycle": one_cycle(0.1, total_steps=STEPS),
    "one_cycle with momentum": one_cycle(0.1, total_steps=STEPS, momentum=(0.85, 0.95)),
    "warmup_cosine": warmup_cosine(0.1, warmup_steps=3, total_steps=STEPS),
    "warmup_stable_decay": warmup_stable_decay(0.1, warmup_steps=2, stable_steps=3, decay_steps=3),
    "torch's ExponentialLR": from_torch(partial(lr_scheduler.ExponentialLR, gamma=0.7), STEPS),
    "torch's CyclicLR": from_torch(
        partial(lr_scheduler.CyclicLR, base_lr=0.01, max_lr=0.1, step_size_up=3), STEPS
    ),
    "a plain function": lambda step: 0.1 / (1 + step),
    "plateau": None,
}


@pytest.fixture
def _quick_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # the disk is not what is tested


def first_state(seed):
    torch.manual_seed(seed)
    optimizer = Optimizer(torch.optim.SGD, lr=0.1, momentum=0.9, groups=[("bias", {"lr": 0.01})])
    return TrainState.create(nn.Linear(3, 2), optimizer).replace(plateau=PLATEAU.init())


def step_of(rate):
    def step(state, batch):
        # one loss is not finite: the rate follows the steps that were taken
        spoilt = float("nan") if state.attempted_steps == 4 else 1.0
        state = forward_loss(state, batch, lambda model, x: spoilt * model(x).square().mean())
        state = optimizer_step(unscale_and_clip(backward_scaled(state), max_norm=1.0))
        state = state.replace(plateau=PLATEAU.update(state.plateau, 1.0))
        return schedule(state, rate or (lambda _: state.plateau.learning_rate))

    return step


@pytest.mark.usefixtures("_quick_disk")
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_goes_on_with_the_same_rates_after_a_stop_at_any_step(name, tmp_path):
    """Float-equal, for every step, every group, and the momentum where it moves."""
    step, seen = step_of(SCHEDULES[name]), []

    def watched(state, batch):
        state = step(state, batch)
        seen.append([(group["lr"], group["momentum"]) for group in state.hyper])
        return state

    reduce(watched, BATCHES, first_state(0))
    whole = seen.copy()
    assert name == "constant" or len({str(rates) for rates in whole}) > 3
    for stop in range(STEPS + 1):
        seen.clear()
        half = reduce(watched, BATCHES[:stop], first_state(0))
        checkpoint.save(half, tmp_path / str(stop))
        loaded = checkpoint.load(tmp_path / str(stop), like=first_state(1))
        assert loaded.hyper == half.hyper
        reduce(watched, BATCHES[stop:], loaded)
        assert seen == whole


@pytest.mark.parametrize("key", _EXACT)
def test_every_key_of_the_environment_is_compared_and_named(key, tmp_path):
    checkpoint.save(make_linear(), tmp_path / "a")
    body = json.loads((tmp_path / "a" / "environment.json").read_text())
    body[key] = "another"
    (tmp_path / "a" / "environment.json").write_bytes(seal(body)[0])
    with pytest.warns(
        InexactResumeWarning, match=rf"in another environment: {key} another there, \S+ here\."
    ):
        checkpoint.load(tmp_path / "a", like=make_linear())
    with pytest.raises(CheckpointIncompatibleError, match=f"{key} another there"):
        checkpoint.load(tmp_path / "a", like=make_linear(), require_exact=True)


def test_the_environment_has_all_that_the_last_bits_depend_on():
    assert {
        "torch",
        "python",
        "cpu_capability",
        "threads",
        "world_size",
        "device",
        "default_dtype",
        "deterministic",
    } <= {*_EXACT}


def holding(buffers):
    """A state whose module has these buffers beside a parameter."""
    model = nn.Linear(2, 1)
    for name, values in buffers.items():
        model.register_buffer(name, values)
    return TrainState.create(model, Optimizer(torch.optim.SGD, lr=0.1))


def test_a_state_with_every_kind_of_tensor_comes_back_to_the_bit(tmp_path):
    """Every dtype with any bits in it, every layout, as buffers of a module."""
    odd = {f"{dtype}".replace("torch.", "of_"): random_bits(dtype, (2, 3)) for dtype in DTYPES}
    odd |= {"scalar": random_bits(torch.float32, ()), "none": torch.ones(0), "rows": torch.ones(0, 5)}
    layouts = {kind.replace(",", "").replace(" ", "_"): t.detach() for kind, t in (ZOO | LOOSE).items()}
    buffers = odd | layouts
    digest = checkpoint.save(holding(buffers), tmp_path / "a")
    loaded = checkpoint.load(tmp_path / "a", like=holding({name: t.clone() for name, t in buffers.items()}))
    assert checkpoint.digest(loaded) == digest
    for name, tensor in buffers.items():
        back, plain = loaded.buffers[name], tensor.resolve_conj().resolve_neg()
        assert (back.dtype, back.shape) == (plain.dtype, plain.shape), name
        assert bits(back) == bits(plain), name
        assert back.stride() == plain.clone().stride(), name


@pytest.mark.parametrize("kind", [kind for kind in unsupported() if kind not in {"meta", "subclass"}])
def test_a_state_with_a_tensor_that_no_file_holds_is_refused_with_nothing_written(kind, tmp_path):
    """The typed error comes before any file exists; the device's own are refused by TrainState.create."""
    tensor, said = unsupported()[kind]
    with pytest.raises(CheckpointUnsupportedError, match=f"'odd' is {said}, which a checkpoint cannot hold"):
        checkpoint.save(holding({"odd": tensor}), tmp_path / "a")
    assert listed(tmp_path) == []


def test_parameters_added_after_the_start_are_none_of_the_state(tmp_path):
    """It saves what it was made with and refuses to train without them; a new state takes them all."""
    model = nn.Sequential(nn.Linear(3, 3))
    state = TrainState.create(model, Optimizer(torch.optim.SGD, lr=0.1))
    model.append(nn.Linear(3, 2))
    with pytest.raises(ConfigError, match=r"The model was changed behind the state: .* 1\.weight, 1\.bias\."):
        step_of(constant(0.1))(state.replace(plateau=PLATEAU.init()), BATCHES[0])
    assert list(state.params) == ["0.weight", "0.bias"]
    checkpoint.save(state, tmp_path / "a")
    wider = TrainState.create(state.model, Optimizer(torch.optim.SGD, lr=0.1))
    assert len(wider.params) == 4
    with pytest.raises(CheckpointIncompatibleError, match=r"parameter 1\.weight: not in the checkpoint"):
        checkpoint.load(tmp_path / "a", like=wider)


def test_what_was_frozen_by_hand_stays_frozen_after_a_load_and_what_was_thawed_stays_thawed(tmp_path):
    """A layer frozen in the middle of a run, as people do in fine-tuning; the oracle is the run that never stopped."""

    def objective(model, batch):
        return model(batch).square().mean()

    def step(state, batch):
        state = unscale_and_clip(backward_scaled(forward_loss(state, batch, objective)), max_norm=1.0)
        return optimizer_step(state)

    def make():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        return TrainState.create(model, Optimizer(torch.optim.SGD, lr=0.1, momentum=0.9))

    batches = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(1))
    state = reduce(step, batches[:2], make())
    checkpoint.save(state, tmp_path / "thawed")
    state.model[0].requires_grad_(requires_grad=False)
    state = step(state, batches[2])
    checkpoint.save(state, tmp_path / "frozen")
    first = state.params["0.weight"].clone()
    state = reduce(step, batches[3:], state)
    assert torch.equal(state.params["0.weight"], first)

    resumed = reduce(step, batches[3:], checkpoint.load(tmp_path / "frozen", like=make()))
    assert first_difference(resumed.params, state.params) is None
    # ``like`` is of the frozen run: the checkpoint decides
    again = step(checkpoint.load(tmp_path / "thawed", like=state), batches[2])
    assert not torch.equal(again.params["0.weight"], first)
