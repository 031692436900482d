"""Saving and loading a state gives the state, and a golden one still loads."""

import json
import warnings
from functools import reduce
from pathlib import Path

import attrs
import pytest
import torch
import torch.nn.functional as F
from checkpoint_helpers import make_batches, make_linear, make_model, make_state, train_step
from safetensors.torch import load_file
from state_helpers import take_step
from torch import nn

from steploop import EarlyStopping, LossScale, Optimizer, ReduceLROnPlateau, TrainState, checkpoint
from steploop.checkpoint.format.sealing import seal
from steploop.checkpoint.provenance import InexactResumeWarning
from steploop.core.early_stopping import Best
from steploop.core.state.parts import plain_names
from steploop.core.trees import named_leaves
from steploop.errors import (
    CheckpointDamagedError,
    CheckpointIncompatibleError,
    ConfigError,
    SpentStateError,
    StepOrderError,
)
from steploop.testing.state_comparison import require_same, values

GOLDEN = Path(__file__).parents[1] / "golden"


def advanced(state, count, batches=None):
    return reduce(train_step, (batches or make_batches(count))[:count], state)


def full_state(seed=0):
    """A state in which every field has a value of its own."""
    early, plateau = EarlyStopping(patience=3), ReduceLROnPlateau(lr=0.5)
    carry = {"hidden": torch.arange(3.0), "queue": [torch.ones(2, dtype=torch.int64)]}
    return (
        advanced(make_state(seed), 3)
        .with_carry(carry)
        .replace(
            epoch=2,
            nonfinite_steps=1,
            early_stopping=early.update(early.init(), 0.25),
            plateau=plateau.update(plateau.init(), 0.5),
            best=Best(value=0.25, step=2, epoch=1),
        )
    )


def test_a_loaded_state_is_the_saved_one_and_goes_on_as_it(tmp_path):
    batches = make_batches(6)
    saved = advanced(make_state(0), 3, batches)
    checkpoint.save(saved, tmp_path / "half")
    loaded = checkpoint.load(tmp_path / "half", like=make_state(1))
    require_same(loaded, saved, "loading gives what was saved")
    one, other = reduce(train_step, batches[3:], loaded), reduce(train_step, batches[3:], saved)
    require_same(one, other, "a resumed run goes on as it would have")


@pytest.mark.parametrize("stops", [(0,), (1, 3, 4), (5,), (6,)], ids=str)
def test_stopping_several_times_in_an_epoch_changes_no_bit(tmp_path, stops):
    """The first batch, the last, one past it, and three stops in one epoch."""
    batches = make_batches(6)
    whole = reduce(train_step, batches, make_state(0))
    state = make_state(0)
    for number, stop in enumerate(stops):
        state = reduce(train_step, batches[state.batch : stop], state)
        checkpoint.save(state, tmp_path / str(number))
        state = checkpoint.load(tmp_path / str(number), like=make_state(number + 1))
        assert state.batch == stop
    require_same(reduce(train_step, batches[state.batch :], state), whole, "the run is the uninterrupted one")


def test_every_leaf_survives_and_counts_in_the_digest(tmp_path):
    """Changing any one leaf changes the digest, and comes back."""
    state = full_state()
    leaves = [name for name, _ in named_leaves(values(state))]
    assert len(leaves) > 60
    digests = {checkpoint.digest(state)}
    like = make_state(1)
    for number, name in enumerate(leaves):
        flipped = with_changed_leaf(state.clone(), name)
        if flipped is None:
            continue
        digest = checkpoint.digest(flipped)
        assert digest not in digests, name
        digests.add(digest)
        if number % 7 == 0:
            assert checkpoint.save(flipped, tmp_path / "x", overwrite=True) == digest
            require_same(checkpoint.load(tmp_path / "x", like=like), flipped, f"{name} comes back")


def changed(value):
    """Another value of the same type that is legal wherever the first one is."""
    if isinstance(value, bool):
        return not value
    return "other" if value is None else value + 1 if isinstance(value, int) else value * 1.25 + 0.001


def with_changed_leaf(state, path):
    """The state with one leaf changed, or None where the leaf has only one legal value."""
    key, _, rest = path.partition(".")
    if key == "precision":
        return None
    if key in plain_names(TrainState) and not rest:
        return state.replace(**{key: changed(getattr(state, key))})
    if key in plain_names(TrainState) and key != "hyper":
        record = getattr(state, key)
        return state.replace(**{key: attrs.evolve(record, **{rest: changed(getattr(record, rest))})})
    if key == "hyper":
        number, name, *inner = rest.split(".")
        group = dict(state.hyper[int(number)])
        if inner:
            betas = list(group[name])
            betas[int(inner[0])] /= 2
            group[name] = tuple(betas)
        else:
            group[name] = changed(group[name])
        return state.replace(hyper=tuple(group if i == int(number) else g for i, g in enumerate(state.hyper)))
    tensor = dict(named_leaves(getattr(state.tensors, key)))[rest]
    with torch.no_grad():
        flat = tensor.data.contiguous().reshape(-1).view(torch.uint8).clone()
        flat[-1] ^= 1
        tensor.data.copy_(flat.view(tensor.dtype).reshape(tensor.shape))
    return state


def test_saving_leaves_the_state_and_the_random_numbers_as_they_were(tmp_path):
    state = full_state()
    before, random_state = checkpoint.digest(state), torch.get_rng_state()
    threads = torch.get_num_threads()
    checkpoint.save(state, tmp_path / "a")
    checkpoint.load(tmp_path / "a", like=state)
    assert checkpoint.digest(state) == before
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.get_num_threads() == threads


def test_equal_states_give_equal_bytes(tmp_path):
    """Whatever depends on time and place stands in environment.json, which is not part of the digest."""
    one, two = full_state(), full_state()
    assert (
        checkpoint.save(one, tmp_path / "a") == checkpoint.save(two, tmp_path / "b") == checkpoint.digest(one)
    )
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert json.loads((tmp_path / "a" / "state.json").read_text())["sha256"] == checkpoint.digest(one)


def test_a_plain_module_loads_the_model_file(tmp_path):
    state = advanced(make_state(0), 2)
    checkpoint.save(state, tmp_path / "a")
    model = make_model(5)
    model.load_state_dict(load_file(tmp_path / "a" / "model.safetensors"))
    assert all(
        torch.equal(model.state_dict()[name], p) for name, p in {**state.params, **state.buffers}.items()
    )


def test_several_states_are_one_checkpoint_that_a_module_dict_loads(tmp_path):
    """The two networks of a GAN."""
    states = {"generator": advanced(make_state(0), 2), "critic": make_linear(1)}
    digest = checkpoint.save(states, tmp_path / "a")
    assert digest == checkpoint.digest(states)
    loaded = checkpoint.load(tmp_path / "a", like={"generator": make_state(3), "critic": make_linear(4)})
    require_same(loaded, states, "loading gives what was saved")
    both = nn.ModuleDict({"generator": make_model(5), "critic": nn.Linear(3, 2)})
    both.load_state_dict(load_file(tmp_path / "a" / "model.safetensors"))
    assert torch.equal(both["critic"].weight, states["critic"].params["weight"])
    with pytest.raises(
        CheckpointIncompatibleError,
        match=r"holds the states \['critic', 'generator'\], and it is loaded into a single",
    ):
        checkpoint.load(tmp_path / "a", like=make_state(0))
    with pytest.raises(CheckpointIncompatibleError, match=r"loaded into the states \['critic', 'g'\]"):
        checkpoint.load(tmp_path / "a", like={"g": make_state(3), "critic": make_linear(4)})


@pytest.mark.parametrize("states", [{}, {"a.b": None}, {"": None}], ids=str)
def test_names_of_states_are_identifiers(states, tmp_path):
    with pytest.raises(ConfigError, match="A name has to be an identifier, such as 'generator'"):
        checkpoint.save(dict.fromkeys(states, make_linear()), tmp_path / "a")


# -- models ---------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """An embedding that is also the output layer, in three places."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.again = nn.Linear(4, 7, bias=False)
        self.head.weight = self.again.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.embedding(tokens)) + self.again(self.embedding(tokens))


def tied_state(seed):
    torch.manual_seed(seed)
    return TrainState.create(Tied(), Optimizer(torch.optim.Adam, lr=0.1))


def test_tied_weights_are_stored_once_and_are_one_parameter_after_loading(tmp_path):
    batch = torch.arange(5), torch.arange(5)
    state = train_step(tied_state(0), batch)
    checkpoint.save(state, tmp_path / "a")
    assert list(load_file(tmp_path / "a" / "model.safetensors")) == ["embedding.weight"]
    metadata = json.loads((tmp_path / "a" / "state.json").read_text())["metadata"]["model.safetensors"]
    assert json.loads(metadata)["aliases"] == {
        "head.weight": "embedding.weight",
        "again.weight": "embedding.weight",
    }
    loaded = checkpoint.load(tmp_path / "a", like=tied_state(1))
    model = loaded.model
    assert model.head.weight is model.again.weight is model.embedding.weight
    assert list(loaded.slots) == ["embedding.weight"]
    require_same(train_step(loaded, batch), train_step(state, batch), "a tied model goes on as it would have")


class Odd(nn.Module):
    """A frozen parameter, one that no loss uses, a buffer that is not persistent, a double and a complex one."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.frozen = nn.Parameter(torch.full((2,), scale), requires_grad=False)
        self.unused = nn.Parameter(torch.full((2,), scale))
        self.used = nn.Parameter(torch.full((3, 2), scale))
        self.register_buffer("transient", torch.full((2,), scale), persistent=False)
        self.register_buffer("wide", torch.full((2,), scale, dtype=torch.complex128))

    def forward(self, x):
        return x @ self.used.T + self.transient.sum()


def odd_state(scale):
    return TrainState.create(Odd(scale), Optimizer(torch.optim.Adam, lr=0.1))


def test_frozen_unused_and_transient_values_come_back(tmp_path):
    batch = torch.ones(4, 2), torch.zeros(4, dtype=torch.int64)
    state = train_step(odd_state(2.0), batch)
    checkpoint.save(state, tmp_path / "a")
    loaded = checkpoint.load(tmp_path / "a", like=odd_state(3.0))
    require_same(loaded, state, "loading gives what was saved")
    assert [p.requires_grad for p in loaded.params.values()] == [False, True, True]
    assert loaded.slots["unused"] == {}
    require_same(train_step(loaded, batch), train_step(state, batch), "it goes on as it would have")
    assert set(load_file(tmp_path / "a" / "model.safetensors")) == {"frozen", "unused", "used", "wide"}
    assert "buffers.transient" in load_file(tmp_path / "a" / "optimizer.safetensors")


# -- optimizers -----------------------------------------------------------------------------------------------------

TORCH_OPTIMIZERS = sorted(
    name
    for name in torch.optim.__all__
    if isinstance(getattr(torch.optim, name), type)
    and getattr(torch.optim, name) is not torch.optim.Optimizer
)
VARIANTS = [(name, {}) for name in TORCH_OPTIMIZERS] + [
    ("SGD", {"momentum": 0.9, "nesterov": True}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "maximize": True}),
    ("Adam", {"amsgrad": True}),
    ("Adam", {"lr": torch.tensor(0.01), "capturable": False}),
    ("AdamW", {"fused": True}),
    ("AdamW", {"foreach": True}),
    ("RMSprop", {"momentum": 0.5, "centered": True}),
    ("LBFGS", {"lr": 0.05, "history_size": 5, "line_search_fn": None}),
    ("LBFGS", {"lr": 0.5, "max_iter": 3, "history_size": 2, "line_search_fn": "strong_wolfe"}),
    ("Adafactor", {"eps": (None, 1e-3)}),
]


def optimizer_state(name, options, seed):
    torch.manual_seed(seed)
    model = nn.Embedding(5, 4, sparse=True) if name == "SparseAdam" else nn.Linear(4, 4, bias=name != "Muon")
    return TrainState.create(model, Optimizer(getattr(torch.optim, name), **({"lr": 0.01} | options)))


def optimizer_step_of(name):
    def objective(model, batch):
        return F.mse_loss(model(batch), torch.ones(()).expand(3, 4))

    from steploop import backward_scaled, forward_loss, unscale_and_clip

    def step(state, batch):
        def gradients(state):
            return unscale_and_clip(
                backward_scaled(forward_loss(state, batch, objective)), max_norm=float("inf")
            )

        return take_step(state, gradients)

    return step


@pytest.mark.parametrize(
    ("name", "options"), VARIANTS, ids=lambda v: v if isinstance(v, str) else ",".join(map(str, v))
)
def test_every_torch_optimizer_goes_on_after_loading_as_it_would_have(tmp_path, name, options):
    """Three steps, save, load, three steps are six steps, bit for bit; and saving leaves the state as it was."""
    generator = torch.Generator().manual_seed(0)
    batches = [
        torch.randint(0, 5, (3,), generator=generator)
        if name == "SparseAdam"
        else torch.randn(3, 4, generator=generator)
        for _ in range(6)
    ]
    step = optimizer_step_of(name)
    half = reduce(step, batches[:3], optimizer_state(name, options, 0))
    digest = checkpoint.save(half, tmp_path / "a")
    loaded = checkpoint.load(tmp_path / "a", like=optimizer_state(name, options, 1))
    require_same(loaded, half, "loading gives what was saved")
    assert checkpoint.digest(half) == checkpoint.digest(loaded) == digest
    whole = reduce(step, batches[3:], half)
    require_same(
        reduce(step, batches[3:], loaded), whole, "three steps, save, load, three steps are six steps"
    )
    require_same(whole, reduce(step, batches, optimizer_state(name, options, 0)), "saving changes nothing")


def test_the_torch_optimizers_are_all_there():
    assert len(TORCH_OPTIMIZERS) >= 14


# -- counters and what is refused -----------------------------------------------------------------------------------


def rewritten(path, change):
    """A checkpoint whose state.json was changed by someone who knows how to seal it."""
    body = json.loads((path / "state.json").read_text())
    change(body["state"]["states"][""])
    (path / "state.json").write_bytes(seal(body)[0])


@pytest.mark.parametrize("value", [2**53, -1, True, 1.0, "1", None, [1]], ids=repr)
@pytest.mark.parametrize("key", ["applied_steps", "attempted_steps", "nonfinite_steps", "epoch", "batch"])
def test_a_counter_that_is_no_count_is_refused(tmp_path, key, value):
    checkpoint.save(make_linear(), tmp_path / "a")
    rewritten(tmp_path / "a", lambda values: values.update({key: value}))
    with pytest.raises(
        CheckpointDamagedError, match=f"{key} is .* in the manifest; expected a count below 2"
    ):
        checkpoint.load(tmp_path / "a", like=make_linear())


def test_the_largest_counts_come_back(tmp_path):
    state = make_linear(seed=0).replace(applied_steps=2**53 - 1, seed=2**63 - 1)
    checkpoint.save(state, tmp_path / "a")
    loaded = checkpoint.load(tmp_path / "a", like=make_linear())
    assert (loaded.applied_steps, loaded.seed) == (2**53 - 1, 2**63 - 1)


def test_a_count_that_float32_cannot_raise_is_warned_of(tmp_path):
    """Adam of torch counts in float32, which sticks at 2**24."""
    batch = torch.ones(2, 3), torch.zeros(2, dtype=torch.int64)
    state = train_step(make_linear(optimizer=Optimizer(torch.optim.Adam, lr=0.1)), batch)
    checkpoint.digest(state)
    with torch.no_grad():
        state.slots["weight"]["step"].fill_(2**24)
    with pytest.warns(
        UserWarning, match="The optimizer's own step count is 16777216, where float32 stops counting"
    ):
        checkpoint.save(state, tmp_path / "a")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("precision", "fp8"), ("precision", ["fp32"]), ("scale", {"scale": 1.0}), ("early_stopping", [1]), ("early_stopping", {"best": "x", "bad_checks": 0, "stopped": False}),
        ("best", {"value": {"float": "nan"}, "step": 0, "epoch": 0}), ("plateau", {"learning_rate": -1.0, "best": None, "bad_checks": 0, "cooldown_left": 0}),
        ("params", [1]), ("params", ["weight", "absent"]), ("groups", 3), ("groups", [[1]]), ("groups", []), ("optimizer", 3), ("slots", {"dict": [["weight", 1]]}),
        ("slots", {"dict": [[1, {"dict": []}]]}), ("slots", []), ("hyper", [1]), ("ema", {"dict": [["weight", 1]]}), ("ema", []), ("transient_buffers", None), ("hyper", {"tensor": "x"}),
        ("extra", 1), ("extra", {"dict": [[1, 2]]}), ("beside", [1]), ("grown", {"a": [1.5]}), ("unknown", 1),
    ],
    ids=str,
)  # fmt: skip
def test_a_state_that_no_steploop_writes_is_refused(tmp_path, field, value):
    checkpoint.save(make_linear(), tmp_path / "a")
    rewritten(tmp_path / "a", lambda values: values.update({field: value}))
    with pytest.raises(CheckpointDamagedError, match=r"manifest|slots|steploop never writes|other fields"):
        checkpoint.load(tmp_path / "a", like=make_linear())


def test_a_state_with_gradients_in_flight_is_refused(tmp_path):
    from steploop import backward_scaled, forward_loss

    state = forward_loss(
        make_state(), make_batches(1)[0], lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])
    )
    checkpoint.digest(state)
    with pytest.raises(StepOrderError, match="holds gradients that no optimizer step has used"):
        checkpoint.save(backward_scaled(state), tmp_path / "a")


def test_a_spent_state_cannot_be_saved_but_can_be_loaded_into(tmp_path):
    first = make_state()
    second = train_step(first, make_batches(1)[0])
    with pytest.raises(SpentStateError):
        checkpoint.save(first, tmp_path / "a")
    checkpoint.save(second, tmp_path / "a")
    require_same(checkpoint.load(tmp_path / "a", like=first), second, "loading gives what was saved")


def test_no_generator_state_is_saved(tmp_path):
    """Randomness is a function of (seed, attempted_steps): there is no generator state to be damaged."""
    checkpoint.save(full_state(), tmp_path / "a")
    names = {
        *load_file(tmp_path / "a" / "model.safetensors"),
        *load_file(tmp_path / "a" / "optimizer.safetensors"),
    }
    assert not [name for name in names if "rng" in name or "generator" in name]


# -- where it was written ---------------------------------------------------------------------------------------------


def test_another_environment_is_named_or_refused(tmp_path):
    checkpoint.save(make_linear(), tmp_path / "a")
    checkpoint.load(tmp_path / "a", like=make_linear(), require_exact=True)
    body = json.loads((tmp_path / "a" / "environment.json").read_text())
    assert {"created", "host", "pid", "steploop"} < set(body)
    body |= {"torch": "2.13.0", "host": "elsewhere", "pid": 1, "world_size": 4}
    (tmp_path / "a" / "environment.json").write_bytes(seal(body)[0])
    with pytest.warns(InexactResumeWarning) as caught:
        checkpoint.load(tmp_path / "a", like=make_linear())
    said = str(caught[0].message)
    assert f"torch 2.13.0 there, {torch.__version__} here; world_size 4 there, 1 here" in said
    assert "host" not in said
    assert caught[0].filename == __file__
    with pytest.raises(CheckpointIncompatibleError, match="An exact resume was required") as e:
        checkpoint.load(tmp_path / "a", like=make_linear(), require_exact=True)
    assert e.value.exit_code == 3


def test_another_number_of_threads_is_another_environment(tmp_path):
    checkpoint.save(make_linear(), tmp_path / "a")
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.warns(InexactResumeWarning, match=f"threads {threads} there, {threads + 1} here"):
            checkpoint.load(tmp_path / "a", like=make_linear())
    finally:
        torch.set_num_threads(threads)


# -- golden -------------------------------------------------------------------------------------------------------------

GOLDEN_DIGESTS = (
    json.loads((GOLDEN / "digests.json").read_text()) if (GOLDEN / "digests.json").exists() else {}
)


def golden_like(name):
    """A first state of the kind that the golden checkpoint of that name holds."""
    return {
        "single": lambda: full_state(1),
        "pair": lambda: {"generator": make_state(3), "critic": tied_state(4)},
    }[name]()


@pytest.mark.parametrize("name", ["single", "pair"])
def test_the_golden_checkpoints_of_version_1_load(name):
    """Every later version has to load them; their bytes never change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InexactResumeWarning)  # they were written on another machine
        state = checkpoint.load(GOLDEN / f"version-1-{name}", like=golden_like(name))
    assert checkpoint.digest(state) == GOLDEN_DIGESTS[name]
    first = state["generator"] if name == "pair" else state
    assert isinstance(first.scale, LossScale)
    assert first.step == 3 - (first.scale.scale < 2.0**16)
