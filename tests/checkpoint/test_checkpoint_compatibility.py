"""A state is loaded only into one it fits, by name, shape and dtype, or as ``migrate`` says."""

import pytest
import torch
from checkpoint_helpers import make_batches, make_linear, make_state, train_step
from torch import nn

from steploop import Optimizer, TrainState, checkpoint
from steploop.errors import CheckpointIncompatibleError, SpentStateError

ADAM = Optimizer(torch.optim.Adam, lr=0.1)


class Net(nn.Module):
    """Parameters and buffers by name, for the tables below."""

    def __init__(self, params, buffers=None, frozen=()):
        super().__init__()
        for name, value in params.items():
            self.register_parameter(name, nn.Parameter(value.clone(), requires_grad=name not in frozen))
        for name, value in (buffers or {}).items():
            self.register_buffer(name, value.clone())


def net(params=None, *, optimizer=ADAM, steps=0, buffers=None, frozen=(), **options):
    """A state over such a network; with ``steps``, slots that are no zeros."""
    params = params or {"a": torch.zeros(2, 3), "b": torch.zeros(3)}
    state = TrainState.create(Net(params, buffers, frozen), optimizer, **options)
    if steps:
        live = state.model
        for p in live.parameters():
            p.grad = (
                torch.arange(1.0, 1 + p.numel()).reshape(p.shape).to(p.dtype) if p.requires_grad else None
            )
        state.machine.optimizer.step()
        for p in live.parameters():
            p.grad = None
    return state


ONE, TWO = {"a": torch.zeros(2, 3)}, {"a": torch.zeros(2, 3), "b": torch.zeros(3)}

# what is saved, what it is loaded into, what the message says (torch itself accepts the marked ones silently)
DIFFERENT = {
    "a parameter more": (net(TWO), net(ONE), "parameter b: in the checkpoint only, float32 (3,)"),
    "a parameter less": (net(ONE), net(TWO), "parameter b: not in the checkpoint, float32 (3,)"),
    "a shape": (net({"a": torch.zeros(2)}), net({"a": torch.zeros(3)}), "parameter a: saved as float32 (2,), but here it is float32 (3,)"),
    "[1] into ()": (net({"a": torch.zeros(1)}), net({"a": torch.zeros(())}), "saved as float32 (1,), but here it is float32 ()"),
    "f64 into f32": (net({"a": torch.zeros(1).double()}), net({"a": torch.zeros(1)}), "saved as float64 (1,), but here it is float32 (1,)"),
    "complex into real": (net({"a": torch.zeros(1) * 1j}), net({"a": torch.zeros(1)}), "saved as complex64 (1,), but here it is float32 (1,)"),
    "a renamed parameter": (net({"c": torch.zeros(1)}), net({"a": torch.zeros(1)}), "parameter c: in the checkpoint only"),
    "reordered parameters": (net(TWO), net(dict(reversed(TWO.items()))), "the order of the parameters: a is saved where this state has b"),
    "a buffer": (net(ONE, buffers={"n": torch.zeros(1)}), net(ONE), "buffer n: in the checkpoint only, float32 (1,)"),
    "a buffer's dtype": (net(ONE, buffers={"n": torch.zeros(1)}), net(ONE, buffers={"n": torch.zeros(1).long()}), "buffer n: saved as float32 (1,), but here it is int64 (1,)"),
    "another optimizer": (net(), net(optimizer=Optimizer(torch.optim.SGD, lr=0.1)), "optimizer: saved with Adam, but this state has SGD"),
    "a group more": (net(), net(optimizer=Optimizer(torch.optim.Adam, lr=0.1, groups=[("b", {"lr": 1.0})])), "parameter groups: saved with [2] parameters each, but here they have [1, 1]"),
    "groups merged": (net(optimizer=Optimizer(torch.optim.Adam, lr=0.1, groups=[("b", {"lr": 1.0})])), net(), "parameter groups: saved with [1, 1] parameters each, but here they have [2]"),
    "groups exchanged": (net(optimizer=Optimizer(torch.optim.Adam, lr=0.1, groups=[("b", {"lr": 1.0})])), net(optimizer=Optimizer(torch.optim.Adam, lr=0.1, groups=[("a", {"lr": 1.0})])), "or are in another order"),
    "frozen here": (net(), net(frozen=["b"]), "parameter b: trained in the checkpoint, but frozen here"),
    "trained here": (net(frozen=["b"]), net(), "parameter b: frozen in the checkpoint, but trained here"),
    "precision": (net(precision="bf16"), net(), "precision: saved as bf16, but this state has fp32"),
    "an average more": (net(ema=True), net(), "ema: saved, but not carried by this state"),
    "an average less": (net(), net(ema=True), "ema: not saved, but carried by this state"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DIFFERENT)
def test_a_state_that_does_not_fit_is_refused_and_nothing_is_loaded(tmp_path, kind):
    saved, like, said = DIFFERENT[kind]
    checkpoint.save(saved, tmp_path / "a")
    before = checkpoint.digest(like)
    with pytest.raises(CheckpointIncompatibleError, match="The checkpoint does not fit the state that") as e:
        checkpoint.load(tmp_path / "a", like=like)
    assert said in str(e.value)
    assert e.value.exit_code == 3
    assert checkpoint.digest(like) == before


def test_another_optimizer_with_the_same_name_is_told_by_its_hyperparameters(tmp_path):

    class Adam(torch.optim.SGD):
        pass

    checkpoint.save(net(), tmp_path / "a")
    with pytest.raises(
        CheckpointIncompatibleError, match="the groups of Adam have other hyperparameters than here"
    ):
        checkpoint.load(tmp_path / "a", like=net(optimizer=Optimizer(Adam, lr=0.1)))


def test_ten_differences_are_listed_and_the_rest_counted(tmp_path):
    checkpoint.save(net({f"p{i}": torch.zeros(1) for i in range(20)}), tmp_path / "a")
    with pytest.raises(CheckpointIncompatibleError) as e:
        checkpoint.load(tmp_path / "a", like=net(ONE))
    assert str(e.value).count("\n  parameter") == 10
    assert "and 32 more" in str(e.value)


def test_a_different_state_in_a_mapping_is_named(tmp_path):
    checkpoint.save({"g": net(), "d": net(ONE)}, tmp_path / "a")
    with pytest.raises(CheckpointIncompatibleError, match="d: parameter b: not in the checkpoint"):
        checkpoint.load(tmp_path / "a", like={"g": net(), "d": net()})


# -- migrate --------------------------------------------------------------------------------------------------------


def test_a_renamed_parameter_takes_its_moments_along(tmp_path):
    saved = net({"a": torch.ones(2), "b": torch.ones(3)}, steps=1, ema=True)
    checkpoint.save(saved, tmp_path / "a")
    like = net({"c": torch.zeros(2), "b": torch.zeros(3)}, ema=True)
    loaded = checkpoint.load(tmp_path / "a", like=like, migrate={"a": "c"})
    assert torch.equal(loaded.params["c"], saved.params["a"])
    assert torch.equal(loaded.ema["c"], saved.ema["a"])
    assert torch.equal(loaded.slots["c"]["exp_avg"], saved.slots["a"]["exp_avg"])
    assert list(loaded.params) == ["c", "b"]


def test_a_replaced_head_keeps_what_this_state_has(tmp_path):
    saved = net({"body": torch.ones(2), "head": torch.ones(3)}, steps=1)
    checkpoint.save(saved, tmp_path / "a")
    like = net({"body": torch.zeros(2), "head": torch.full((7,), 5.0)})
    loaded = checkpoint.load(tmp_path / "a", like=like, migrate={"head": None})
    assert torch.equal(loaded.params["body"], saved.params["body"])
    assert torch.equal(loaded.params["head"], torch.full((7,), 5.0))
    assert loaded.slots["head"] == {}
    assert torch.equal(loaded.slots["body"]["exp_avg"], saved.slots["body"]["exp_avg"])
    with torch.no_grad():
        loaded.params["head"].zero_()
    assert torch.equal(like.params["head"], torch.full((7,), 5.0))


def test_an_empty_map_allows_another_optimizer_grouping_freezing_and_order(tmp_path):
    """What differs besides names is taken from ``like``; moments go with parameters of the same optimizer class."""
    saved = net({"a": torch.ones(2), "b": torch.ones(3)}, steps=1)
    checkpoint.save(saved, tmp_path / "a")
    other = Optimizer(torch.optim.SGD, lr=0.5)
    loaded = checkpoint.load(
        tmp_path / "a", like=net({"b": torch.zeros(3), "a": torch.zeros(2)}, optimizer=other), migrate={}
    )
    assert (loaded.slots["a"], loaded.learning_rate) == ({}, 0.5)
    assert list(loaded.params) == ["b", "a"]
    grouped = Optimizer(torch.optim.Adam, lr=0.3, groups=[("b", {"lr": 1.0})])
    loaded = checkpoint.load(
        tmp_path / "a", like=net({"a": torch.zeros(2), "b": torch.zeros(3)}, optimizer=grouped), migrate={}
    )
    assert [group["lr"] for group in loaded.hyper] == [0.3, 1.0]
    assert torch.equal(loaded.slots["b"]["exp_avg"], saved.slots["b"]["exp_avg"])
    loaded = checkpoint.load(
        tmp_path / "a", like=net({"a": torch.zeros(2), "b": torch.zeros(3)}, frozen=["b"]), migrate={}
    )
    assert list(loaded.slots) == ["a"]
    assert torch.equal(loaded.params["b"], saved.params["b"])


def test_a_migrated_state_with_the_same_groups_keeps_the_saved_learning_rate(tmp_path):
    saved = net(steps=1)
    checkpoint.save(saved.replace(hyper=({**saved.hyper[0], "lr": 0.025},)), tmp_path / "a")
    assert checkpoint.load(tmp_path / "a", like=net(), migrate={}).learning_rate == 0.025


def test_averages_begin_as_this_state_has_them_where_none_were_saved(tmp_path):
    checkpoint.save(net(), tmp_path / "a")
    like = net({"a": torch.ones(2, 3), "b": torch.ones(3)}, ema=True)
    loaded = checkpoint.load(tmp_path / "a", like=like, migrate={})
    assert torch.equal(loaded.ema["a"], torch.ones(2, 3))
    assert loaded.ema["a"] is not like.ema["a"]
    checkpoint.save(like, tmp_path / "b")
    assert checkpoint.load(tmp_path / "b", like=net(), migrate={}).ema is None


def test_precision_follows_this_state_and_the_loss_scale_is_kept_between_fp16_states(tmp_path):
    state = train_step(make_state(0), make_batches(1)[0])
    checkpoint.save(state, tmp_path / "a")
    assert checkpoint.load(tmp_path / "a", like=make_state(1), migrate={}).scale == state.scale
    loaded = checkpoint.load(tmp_path / "a", like=make_state(1, precision="bf16"), migrate={})
    assert (loaded.precision, loaded.scale) == ("bf16", None)


def test_what_the_map_does_not_name_is_refused(tmp_path):
    checkpoint.save(net(TWO), tmp_path / "a")
    with pytest.raises(
        CheckpointIncompatibleError,
        match=r"migrate does not say what becomes of:\n  parameter b: in the checkpoint only",
    ):
        checkpoint.load(tmp_path / "a", like=net(ONE), migrate={})
    with pytest.raises(
        CheckpointIncompatibleError,
        match="migrate: neither the checkpoint nor this state has a parameter or buffer 'x'",
    ):
        checkpoint.load(tmp_path / "a", like=net(TWO), migrate={"x": None})
    with pytest.raises(
        CheckpointIncompatibleError,
        match=r"parameter b: saved as float32 \(2, 3\), but here it is float32 \(3,\)",
    ):
        checkpoint.load(tmp_path / "a", like=net(TWO), migrate={"a": "b", "b": "a"})


def test_the_map_of_several_states_bears_their_names(tmp_path):
    checkpoint.save({"g": net(TWO, steps=1), "d": net(ONE)}, tmp_path / "a")
    like = {"g": net({"a": torch.zeros(2, 3), "c": torch.zeros(3)}), "d": net(ONE)}
    loaded = checkpoint.load(tmp_path / "a", like=like, migrate={"g.b": "g.c"})
    assert loaded["g"].slots["c"]["step"].item() == 1.0


def test_what_a_spent_state_no_longer_has_cannot_be_kept(tmp_path):
    state = make_state(0)
    after = train_step(state, make_batches(1)[0])
    checkpoint.save(after, tmp_path / "a")
    with pytest.raises(SpentStateError):
        checkpoint.load(tmp_path / "a", like=state, migrate={"5.bias": None})


def test_loading_does_not_touch_the_state_it_is_compared_with(tmp_path):
    checkpoint.save(make_linear(0), tmp_path / "a")
    like = make_linear(1)
    before = checkpoint.digest(like)
    loaded = checkpoint.load(tmp_path / "a", like=like)
    with torch.no_grad():
        loaded.params["weight"].zero_()
    assert checkpoint.digest(like) == before
    assert checkpoint.digest(loaded) != before
