"""Weights that share memory: one Parameter in several places is tied for good, and anything else is refused.

What these would catch: a check that compares objects, or starts of memory only, or the outermost bytes only; one that
comes after the model was moved or copied, when the tie is gone already.
"""

import copy

import pytest
import torch
from checkpoint_helpers import listed
from hypothesis import given
from hypothesis import strategies as st
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
from steploop.core.state.shared_memory import shared_memory
from steploop.errors import CheckpointUnsupportedError, ConfigError
from steploop.testing.state_comparison import require_same

SGD = Optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)


class Holding(nn.Module):
    """Parameters and buffers by name."""

    def __init__(self, params, buffers=None):
        super().__init__()
        for name, values in params.items():
            self.register_parameter(
                name, values if isinstance(values, nn.Parameter) else nn.Parameter(values)
            )
        for name, values in (buffers or {}).items():
            self.register_buffer(name, values)

    def forward(self, x):
        return sum(p.sum() for p in self.parameters()) * x.sum()


def step(state, batch):
    state = backward_scaled(forward_loss(state, batch, lambda model, x: model(x).square()))
    return optimizer_step(unscale_and_clip(state, max_norm=1.0))


def ties():
    """Parameters, buffers, and the two names that the message has."""
    flat = torch.arange(24.0)
    matrix = flat.view(4, 6)
    weight = nn.Parameter(torch.ones(7, 4))
    return {
        "the whole": ({"a": flat, "b": flat.view(4, 6)}, {}, "a and b"),
        "a view of the data": ({"embedding": weight, "head": weight.data[2:]}, {}, "embedding and head"),
        "the transpose": ({"a": weight, "b": weight.data.t()}, {}, "a and b"),
        "the last element": ({"a": flat[:9], "b": flat[8:]}, {}, "a and b"),
        "inside": ({"a": flat, "b": flat[3:5]}, {}, "a and b"),
        "of three the outer two": ({"a": flat[:20], "b": flat[20:22], "c": flat[19:20]}, {}, "a and c"),
        "columns that meet": ({"a": matrix[:, :4], "b": matrix[:, 3:]}, {}, "a and b"),
        "another type": ({"a": flat, "b": flat.view(torch.complex64)[:2]}, {}, "a and b"),
        "a single number": ({"a": flat, "b": flat[23]}, {}, "a and b"),
        "a buffer": ({"a": flat}, {"n": flat[:2]}, "a and n"),
        "a buffer behind buffers": ({"a": flat[5:]}, {"m": flat[:20], "n": flat[:2]}, "m and a"),
    }


@pytest.mark.parametrize("kind", ties())
@pytest.mark.parametrize("options", [{}, {"device": "cpu"}, {"ema": True}], ids=str)
def test_a_tie_that_a_copy_would_undo_is_refused_at_the_start(kind, options):
    """Before it is moved anywhere; both are named, and what to do instead."""
    params, buffers, names = ties()[kind]
    model = Holding(params, buffers)
    with pytest.raises(ConfigError) as caught:
        TrainState.create(model, SGD, **options)
    assert str(caught.value).startswith(
        f"TrainState.create: {names} lie in the same memory but are two tensors."
    )
    assert "assign the same Parameter in both places (head.weight = embedding.weight)" in str(caught.value)


def test_it_is_refused_too_where_another_state_trains_the_model():
    """Such a state starts from copies, in which nobody would see the tie any more."""
    model = Holding({"a": torch.ones(4)})
    first = TrainState.create(model, SGD)
    model.b = nn.Parameter(model.a.data[:2])
    with pytest.raises(ConfigError, match="a and b lie in the same memory"):
        TrainState.create(model, SGD)
    assert first.alive


FINE = {
    "slices that do not meet": lambda: Holding({"a": torch.ones(6)[:2], "b": torch.ones(6)[2:]}),
    "slices of one storage": lambda: Holding(dict(zip("abc", torch.arange(6.0).split(2), strict=True))),
    "columns": lambda: Holding(dict(zip("ab", torch.ones(4, 6).split(3, dim=1), strict=True))),
    "even and odd": lambda: Holding(dict(zip("ab", torch.arange(9.0).view(3, 3).t().split(1), strict=False))),
    "empty ones": lambda: Holding({"a": torch.ones(4)[:0], "b": torch.ones(4)[:0], "c": torch.ones(4)}),
    "buffers that overlap": lambda: Holding(
        {"a": torch.ones(3)}, dict(zip("mn", (torch.ones(4),) * 2, strict=True))
    ),
    "one Parameter in two places": lambda: Holding(dict.fromkeys("ab", nn.Parameter(torch.ones(3)))),
}


@pytest.mark.parametrize("kind", FINE)
def test_what_shares_a_storage_and_no_number_trains_and_is_saved(kind, tmp_path):
    state = step(TrainState.create(FINE[kind](), SGD), torch.ones(2))
    checkpoint.save(state, tmp_path / "a")
    loaded = checkpoint.load(tmp_path / "a", like=TrainState.create(FINE[kind](), SGD))
    require_same(loaded, state, "loading gives what was saved")
    require_same(step(loaded, torch.ones(2)), step(state, torch.ones(2)), "it goes on as it would have")


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_whose_weights_are_flattened_are_no_tie(make, tmp_path):
    """``flatten_parameters`` puts all of them into one storage, where it does anything."""

    def recurrent():
        torch.manual_seed(0)
        model = make(3, 4, num_layers=2, bidirectional=True)
        model.flatten_parameters()
        return TrainState.create(model, SGD)

    def taken(state):
        state = forward_loss(state, torch.ones(2, 1, 3), lambda model, x: model(x)[0].square().mean())
        return optimizer_step(unscale_and_clip(backward_scaled(state), max_norm=1.0))

    state = taken(recurrent())
    checkpoint.save(state, tmp_path / "a")
    loaded = checkpoint.load(tmp_path / "a", like=recurrent())
    require_same(taken(loaded), taken(state), "it goes on as it would have")


def test_a_tied_weight_stays_tied_in_clones_and_has_one_slot():
    state = TrainState.create(FINE["one Parameter in two places"](), SGD).clone()
    state = step(state, torch.ones(2))
    assert list(state.params) == list(state.slots) == ["a"]
    assert state.model.a is state.model.b is state.params["a"]
    assert copy.deepcopy(state.model).b is not state.model.b


class Shadowed(nn.Module):
    """A forward pass that puts a view of a weight into the place of a buffer."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("shadow", torch.zeros(2))

    def forward(self, x):
        self.shadow = self.weight.detach()[:2]
        return (x * self.weight).sum()


def test_a_tie_that_a_step_made_is_refused_at_save(tmp_path):
    """They would move together before the save and apart after it."""
    state = step(TrainState.create(Shadowed(), SGD), torch.ones(3))
    with pytest.raises(CheckpointUnsupportedError, match="'weight' and 'shadow' lie in the same memory"):
        checkpoint.save(state, tmp_path / "a")
    assert listed(tmp_path) == []


class Wrapper(torch.Tensor):
    """A tensor that is made of others, as distributed and quantized ones are: it has no address."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return NotImplemented


@pytest.mark.parametrize(
    "make",
    [
        lambda: Wrapper(torch.ones(3)),
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.ones(3, device="meta"),
        lambda: torch.ones(0),
    ],
    ids=["wrapper", "sparse", "meta", "empty"],
)
def test_tensors_without_an_address_share_nothing(make):
    one = make()
    assert shared_memory({"a": one, "b": one}, {"c": one}) is None


@given(
    st.lists(
        st.tuples(
            st.integers(0, 30), st.integers(0, 4), st.integers(1, 5), st.integers(0, 4), st.integers(1, 5)
        ),
        min_size=2,
        max_size=5,
    )
)
def test_two_tensors_share_memory_where_writing_to_one_changes_the_other(places):
    """As a law: for any strided views of a storage, overlapping in themselves too."""
    storage = torch.zeros(80)
    views = {
        f"v{i}": storage.as_strided((n, m), (s, t), start) for i, (start, n, s, m, t) in enumerate(places)
    }
    meeting = set()
    for one, view in views.items():
        storage.zero_()
        for row in view:
            for element in row:
                element.fill_(1.0)
        meeting |= {(one, other) for other in views if other != one and views[other].any()}
    found = shared_memory(views, {})
    assert (found is None) == (not meeting)
    assert found is None or found in meeting
    assert shared_memory({}, views) is None
