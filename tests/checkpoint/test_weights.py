"""Weights alone: put into a new state from checkpoints and other people's files, and written for a plain module."""

import json
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
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
from steploop.checkpoint.weight_export import export_weights
from steploop.errors import (
    CheckpointDamagedError,
    CheckpointIncompatibleError,
    CheckpointWriteError,
    ConfigError,
)


class Tied(nn.Module):
    """An embedding whose weight is the head's too, a normalisation with buffers, and a buffer that is not persistent."""

    def __init__(self, classes=5):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.out = nn.Linear(7, classes)
        self.register_buffer("mask", torch.ones(3), persistent=False)

    def forward(self, batch):
        return self.out(self.head(self.norm(self.embedding(batch))))


def a_state(seed=0, classes=5, **options):
    torch.manual_seed(seed)
    return TrainState.create(Tied(classes), Optimizer(torch.optim.AdamW, lr=0.1), **options)


def trained(steps=3, **options):
    state = a_state(1, **options)
    for n in range(steps):
        state = forward_loss(
            state, torch.arange(6) % (n + 2), lambda model, batch: model(batch).square().mean()
        )
        state = optimizer_step(unscale_and_clip(backward_scaled(state), max_norm=1.0))
        state = update_ema(state, decay=0.5) if state.ema is not None else state
    return state


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_checkpoint_gives_its_weights_and_nothing_else(tmp_path):
    source = trained()
    checkpoint.save(source, tmp_path / "kept")
    into, tables = a_state(2, ema=True), []
    before = checkpoint.digest(into)
    state = checkpoint.load_weights(tmp_path / "kept", into=into, report=tables.append)
    assert same(state.params, source.params)
    assert same(state.buffers, source.buffers)
    assert same(state.ema, source.params)
    assert (state.step, state.attempted_steps, state.best, state.learning_rate) == (0, 0, None, 0.1)
    assert not any(state.slots.values())
    assert checkpoint.digest(into) == before
    assert str(tables[0]).startswith(f"8 of 8 tensors loaded from {tmp_path / 'kept'}")
    stepped = optimizer_step(
        unscale_and_clip(
            backward_scaled(forward_loss(state, torch.arange(6), lambda m, b: m(b).square().mean())),
            max_norm=1.0,
        )
    )
    assert stepped.step == 1


@pytest.mark.parametrize("average", [False, True])
def test_what_is_exported_loads_into_a_plain_module_strictly_and_computes_the_same(average, tmp_path):
    """A tied parameter stands under each of its names; raw and averaged weights are each what they say."""
    source = trained(ema=True)
    checkpoint.save(source, tmp_path / "kept")
    opened = checkpoint.open_checkpoint(tmp_path / "kept")
    assert export_weights(opened, tmp_path / "w.safetensors", average=average) == 9
    module = Tied()
    module.load_state_dict(load_file(tmp_path / "w.safetensors"))
    module.eval()
    values = source.ema if average else source.params
    assert same(dict(module.named_parameters()), dict(values))
    expected = torch.func.functional_call(Tied().eval(), {**values, **source.buffers}, (torch.arange(6),))
    assert torch.equal(module(torch.arange(6)), expected)
    assert (tmp_path / "w.safetensors").stat().st_mode & 0o777 == (
        tmp_path / "kept" / "state.json"
    ).stat().st_mode & 0o777
    state = checkpoint.load_weights(tmp_path / "w.safetensors", into=a_state())
    assert same(state.params, dict(values))
    again = checkpoint.load_weights(tmp_path / "kept", into=a_state(), average=average)
    assert same(again.params, dict(values))


def test_an_export_replaces_nothing_unasked_and_follows_no_link(tmp_path):
    checkpoint.save(trained(), tmp_path / "kept")
    opened = checkpoint.open_checkpoint(tmp_path / "kept")
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "w.safetensors").symlink_to(tmp_path / "victim")
    with pytest.raises(ConfigError, match=r"w\.safetensors exists already"):
        export_weights(opened, tmp_path / "w.safetensors")
    export_weights(opened, tmp_path / "w.safetensors", overwrite=True)
    assert (tmp_path / "victim").read_text() == "mine"
    with pytest.raises(CheckpointIncompatibleError, match="holds no average of embedding"):
        export_weights(opened, tmp_path / "a.safetensors", average=True)
    with pytest.raises(CheckpointWriteError, match="cannot be written"):
        export_weights(opened, tmp_path / "missing" / "w.safetensors")


def test_one_of_several_states_is_exported_under_the_names_of_its_module(tmp_path):
    states = {"first": trained(), "second": a_state(5)}
    checkpoint.save(states, tmp_path / "kept")
    opened = checkpoint.open_checkpoint(tmp_path / "kept")
    export_weights(opened, tmp_path / "one.safetensors", state="first")
    Tied().load_state_dict(load_file(tmp_path / "one.safetensors"))
    export_weights(opened, tmp_path / "both.safetensors")
    both = checkpoint.load_weights(
        tmp_path / "both.safetensors", into={"first": a_state(6), "second": a_state(7)}
    )
    assert same(both["first"].params, states["first"].params)
    assert same(both["second"].params, states["second"].params)
    with pytest.raises(ConfigError, match=r"There is no state 'third'\. Tensors begin with: first, second"):
        export_weights(opened, tmp_path / "no.safetensors", state="third")


def plain(**changes):
    """The state dict of a plain module, as somebody else would save it: tied tensors copied."""
    torch.manual_seed(3)
    return {name: tensor.clone() for name, tensor in Tied().state_dict().items()} | changes


@given(
    prefix=st.sampled_from(["module.", "_orig_mod.", ""]),
    half=st.booleans(),
    without=st.sampled_from(["head.weight", "embedding.weight", None]),
)
def test_files_of_others_fit_wrapped_in_half_precision_and_with_one_name_of_a_tied_weight(
    prefix, half, without, tmp_path_factory
):
    place = tmp_path_factory.mktemp("weights") / "w.safetensors"
    tensors = plain()
    saved = {
        n: t.bfloat16() if half and t.is_floating_point() else t for n, t in tensors.items() if n != without
    }
    save_file({prefix + name: tensor for name, tensor in saved.items()}, place)
    state = checkpoint.load_weights(place, into=a_state())
    for name, value in (*state.params.items(), *((n, b) for n, b in state.buffers.items() if n != "mask")):
        assert value.dtype == tensors[name].dtype
        assert torch.equal(value, saved.get(name, saved.get("head.weight")).to(value.dtype))


def test_names_are_given_by_what_they_begin_with(tmp_path):
    save_file(
        {f"encoder.{name}": t for name, t in plain().items()} | {"pooler.weight": torch.ones(2)},
        tmp_path / "w.safetensors",
    )
    with pytest.raises(
        CheckpointIncompatibleError,
        match=r"8 names would match with rename=\{'encoder': ''\} \(--init-rename encoder=\)\.$",
    ):
        checkpoint.load_weights(tmp_path / "w.safetensors", into=a_state())
    state = checkpoint.load_weights(
        tmp_path / "w.safetensors", into=a_state(), rename={"encoder": "", "pooler": None}
    )
    assert same(dict(state.params), {name: plain()[name] for name in state.params})
    swapped = {
        "encoder": "",
        "pooler": None,
        "encoder.norm.weight": "norm.bias",
        "encoder.norm.bias": "norm.weight",
    }
    state = checkpoint.load_weights(tmp_path / "w.safetensors", into=a_state(), rename=swapped)
    assert torch.equal(state.params["norm.bias"], plain()["norm.weight"])
    with pytest.raises(ConfigError, match="rename gives 'x' to"):
        checkpoint.load_weights(
            tmp_path / "w.safetensors",
            into=a_state(),
            rename={"encoder.norm.weight": "x", "encoder.norm.bias": "x"},
        )


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Linear(2, 2)


def test_a_prefix_can_be_put_before_every_name(tmp_path):
    save_file({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, tmp_path / "w.safetensors")
    into = TrainState.create(Wrapped(), Optimizer(torch.optim.SGD, lr=0.1))
    with pytest.raises(
        CheckpointIncompatibleError, match=r"2 names would match with rename=\{'': 'backbone'\}"
    ):
        checkpoint.load_weights(tmp_path / "w.safetensors", into=into)
    state = checkpoint.load_weights(tmp_path / "w.safetensors", into=into, rename={"": "backbone"})
    assert state.params["backbone.bias"].tolist() == [1, 1]


def test_another_head_is_kept_if_that_is_said_and_the_table_says_why(tmp_path):
    save_file(plain() | {"extra": torch.ones(1)}, tmp_path / "w.safetensors")
    into, tables = a_state(4, classes=3), []
    with pytest.raises(CheckpointIncompatibleError) as caught:
        checkpoint.load_weights(tmp_path / "w.safetensors", into=into, report=tables.append)
    assert "out.weight: (5, 7) in the file, (3, 7) here" in str(caught.value)
    assert "extra: in the file only" in str(caught.value)
    with pytest.raises(CheckpointIncompatibleError, match="extra: in the file only"):
        checkpoint.load_weights(tmp_path / "w.safetensors", into=into, partial=["out.*"])
    for partial in (True, ["out.*", "extra"]):
        state = checkpoint.load_weights(tmp_path / "w.safetensors", into=into, partial=partial)
        assert torch.equal(state.params["out.weight"], into.params["out.weight"])
        assert torch.equal(state.params["norm.weight"], plain()["norm.weight"])
    assert str(tables[0]).splitlines() == [
        f"6 of 8 tensors loaded from {tmp_path / 'w.safetensors'}",
        "  out.weight  kept      (5, 7) in the file, (3, 7) here",
        "  out.bias    kept      (5,) in the file, (3,) here",
        "  extra       not used  in the file only",
    ]


def test_a_file_of_which_nothing_fits_is_refused_even_where_parts_may_be_missing(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointIncompatibleError, match="does not hold the weights of this model"):
        checkpoint.load_weights(tmp_path / "w.safetensors", into=a_state(), partial=True)


def test_integers_are_no_weights_and_untied_values_of_one_parameter_are_refused(tmp_path):
    save_file(plain(**{"norm.weight": torch.ones(4, dtype=torch.int64)}), tmp_path / "w.safetensors")
    with pytest.raises(CheckpointIncompatibleError, match=r"norm\.weight: int64 in the file, float32 here"):
        checkpoint.load_weights(tmp_path / "w.safetensors", into=a_state())
    save_file(plain(**{"head.weight": torch.ones(7, 4)}), tmp_path / "w.safetensors")
    with pytest.raises(
        CheckpointIncompatibleError, match=r"embedding\.weight and head\.weight are one parameter here"
    ):
        checkpoint.load_weights(tmp_path / "w.safetensors", into=a_state())


def test_shards_of_an_index_are_read_together(tmp_path):
    tensors = plain()
    names, index = sorted(tensors), {}
    for number, part in enumerate((names[:3], names[3:])):
        save_file({name: tensors[name] for name in part}, tmp_path / f"model-{number}.safetensors")
        index |= dict.fromkeys(part, f"model-{number}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    state = checkpoint.load_weights(tmp_path, into=a_state())
    assert same(dict(state.params), {name: tensors[name] for name in state.params})
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "../x.safetensors"}})
    )
    with pytest.raises(CheckpointDamagedError, match="not a file in its folder"):
        checkpoint.load_weights(tmp_path, into=a_state())


@pytest.mark.parametrize(
    ("name", "content", "error", "said"),
    [
        ("w.safetensors", b"\0" * 7, CheckpointDamagedError, "is no safetensors file that can be read"),
        ("w.safetensors", b"\xff" * 64, CheckpointDamagedError, "is no safetensors file that can be read"),
        ("w.pt", b"", ConfigError, "is a pickle, which can run code"),
        ("pytorch_model.bin", b"", ConfigError, "is a pickle, which can run code"),
        ("missing.safetensors", None, ConfigError, "There are no weights at"),
        ("folder", None, ConfigError, "There are no weights at"),
    ],
)
def test_what_is_no_file_of_weights_is_refused(name, content, error, said, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=said):
        checkpoint.load_weights(tmp_path / name, into=a_state())


def test_a_folder_without_weights_and_a_pipe_are_refused_and_nothing_waits(tmp_path):
    with pytest.raises(ConfigError, match="holds no weights"):
        checkpoint.load_weights(tmp_path, into=a_state())
    os.mkfifo(tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match="is no regular file"):
        checkpoint.load_weights(tmp_path / "w.safetensors", into=a_state())
