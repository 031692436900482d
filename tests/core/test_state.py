"""TrainState: what makes one, who owns its tensors, what it refuses."""

import io
from contextlib import nullcontext

import attrs
import pytest
import torch
import torch.nn.functional as F
from state_helpers import with_flight
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from steploop import (
    LossScale,
    Optimizer,
    TrainState,
    backward_scaled,
    evaluate,
    forward_loss,
    optimizer_step,
    schedule,
    unscale_and_clip,
)
from steploop.core.ambient_generators import generators_of
from steploop.core.state.creation import copy_leaf
from steploop.core.state.optimizer_traits import settle_implementation
from steploop.core.state.parts import Gradients
from steploop.core.state.shared_memory import shared_memory
from steploop.core.trees import first_difference, named_leaves
from steploop.errors import ConfigError, SpentStateError, StepOrderError

SGD = Optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.2), nn.Linear(6, 3))


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(7, 4, generator=generator), torch.randint(3, (7,), generator=generator)


def objective(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def step(state, data, *, donate=True):
    state = unscale_and_clip(backward_scaled(forward_loss(state, data, objective)), max_norm=1.0)
    return optimizer_step(state, donate=donate)


def values(state):
    return {"params": dict(state.params), "buffers": dict(state.buffers), "slots": dict(state.slots)}


def test_a_state_begins_at_0_in_float32_unless_told_otherwise():
    state = TrainState.create(network(), SGD)
    assert (state.seed, state.precision, state.scale, state.ema) == (0, "fp32", None, None)
    assert (state.epoch, state.batch, state.attempted_steps, state.applied_steps) == (0, 0, 0, 0)
    assert TrainState.create(network(), SGD, precision="fp16").scale == LossScale()
    assert (
        TrainState.create(network(), SGD, precision="fp16", loss_scale=LossScale(scale=2.0)).scale.scale
        == 2.0
    )
    highest = TrainState.create(network(), SGD, seed=2**63 - 1)
    assert highest.seed == 2**63 - 1


def test_a_model_is_moved_as_model_to_does_it():
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4))
    state = TrainState.create(model, SGD, memory_format=torch.channels_last)
    assert state.params["0.weight"].is_contiguous(memory_format=torch.channels_last)
    moved = TrainState.create(network(), SGD, device="meta")
    assert {t.device.type for t in (*moved.params.values(), *moved.buffers.values())} == {"meta"}
    assert moved.device.type == "meta"


def test_an_average_begins_as_a_copy_of_the_parameters():
    state = TrainState.create(network(), SGD, ema=True)
    assert first_difference(dict(state.ema), dict(state.params)) is None
    assert all(t is not state.params[n] and not t.requires_grad for n, t in state.ema.items())


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("kind", [nn.Parameter, torch.Tensor])
def test_a_copy_of_a_leaf_is_a_leaf_of_its_kind(kind, requires_grad):
    leaf = kind([1.0, 2.0]) if kind is torch.Tensor else kind(torch.tensor([1.0, 2.0]))
    leaf.requires_grad_(requires_grad)
    copy = copy_leaf(leaf)
    assert (type(copy), copy.is_leaf, copy.requires_grad) == (kind, True, requires_grad)
    assert copy.data_ptr() != leaf.data_ptr()
    assert torch.equal(copy, leaf)


def test_the_model_computes_with_the_state_values_without_a_copy():
    model = network()
    state = TrainState.create(model, SGD)
    assert all(state.params[name] is p for name, p in model.named_parameters())
    assert all(state.buffers[name] is b for name, b in model.named_buffers())
    new = step(state, batch())
    assert all(new.params[name] is p for name, p in model.named_parameters())
    assert all(new.buffers[name] is b for name, b in model.named_buffers())


def test_every_use_of_a_spent_state_says_which_step_spent_it_and_what_to_do():
    state = TrainState.create(network(), SGD)
    step(state, batch())
    uses = {
        "params": lambda: state.params,
        "buffers": lambda: state.buffers,
        "slots": lambda: state.slots,
        "ema": lambda: state.ema,
        "grads": lambda: state.grads,
        "model": lambda: state.model,
        "clone()": state.clone,
        "forward_loss": lambda: forward_loss(state, batch(), objective),
        "backward_scaled": lambda: backward_scaled(state),
        "unscale_and_clip": lambda: unscale_and_clip(state, max_norm=1.0),
        "optimizer_step": lambda: optimizer_step(state),
        "schedule": lambda: schedule(state, lambda step: 0.1),
        "evaluate": lambda: evaluate(state, [batch()], objective),
    }
    for name, use in uses.items():
        with pytest.raises(SpentStateError) as caught:
            use()
        text = str(caught.value)
        assert text.startswith(f"{name}: this state is spent: optimizer_step at attempted step 0"), text
        assert "state.clone()" in text
        assert "donate=False" in text
    assert "(spent)" in repr(state)


def test_a_state_whose_step_did_not_donate_can_be_used_again():
    state = TrainState.create(network(), SGD)
    state = step(state, batch())
    before = {
        key: {n: torch.clone(t) for n, t in values(state)[key].items()} for key in ("params", "buffers")
    }
    slots = {n: {k: v.clone() for k, v in s.items()} for n, s in state.slots.items()}
    first, second = step(state, batch(1), donate=False), step(state, batch(1), donate=False)
    assert first_difference(values(state), {**before, "slots": slots}) is None
    assert first_difference(values(first), values(second)) is None
    assert first_difference(values(first), values(step(state, batch(1)))) is None


def test_clones_of_one_model_train_side_by_side_as_if_they_were_alone():
    alone = TrainState.create(network(), SGD)
    for seed in range(6):
        alone = step(alone, batch(seed))
    one = TrainState.create(network(), SGD)
    other = one.clone()
    for seed in range(6):
        one, other = step(one, batch(seed)), step(other, batch(seed))
    assert first_difference(values(one), values(alone)) is None
    assert first_difference(values(other), values(alone)) is None
    one = step(one, batch(9))
    assert first_difference(values(other), values(alone)) is None
    assert first_difference(values(one), values(alone)) is not None


def test_a_second_state_of_the_same_model_starts_from_a_copy_and_leaves_the_first_alone():
    model = network()
    first = TrainState.create(model, SGD)
    second = TrainState.create(model, Optimizer(torch.optim.AdamW, lr=0.1))
    kept = {n: p.detach().clone() for n, p in first.params.items()}
    assert all(b is not first.buffers[n] and b.equal(first.buffers[n]) for n, b in second.buffers.items())
    second = step(second, batch())
    assert first_difference(dict(first.params), kept) is None
    assert all(p is first.params[n] for n, p in model.named_parameters())
    assert first_difference(dict(second.params), kept) is not None


def test_when_the_first_state_is_gone_the_model_follows_the_clone():
    model = network()
    state = TrainState.create(model, SGD).clone()
    state = step(state, batch())
    assert all(p is state.params[n] for n, p in model.named_parameters())


def test_state_model_holds_the_values_of_the_state_it_was_asked_of():
    model = network()
    first = TrainState.create(model, SGD)
    second = step(first.clone(), batch())
    assert second.model[0].weight is second.params["0.weight"]
    assert first.model[0].weight is first.params["0.weight"]


def test_a_model_left_in_eval_mode_trains_and_a_part_frozen_on_purpose_stays_in_eval():
    state = step(TrainState.create(network().eval(), SGD), batch())
    assert state.buffers["1.num_batches_tracked"] == 1
    model = network()
    model[1].eval()
    state = step(TrainState.create(model, SGD), batch())
    assert state.buffers["1.num_batches_tracked"] == 0
    state = step(TrainState.create(state.model, SGD), batch())
    state.model.train()  # by somebody who meant the model, not the part
    state = step(state, batch())
    assert state.buffers["1.num_batches_tracked"] == 0
    assert [module.training for module in model] == [True, False, True, True, True]


def test_frozen_parameters_stay_as_they_are_and_have_no_slots():
    model = network()
    model[0].requires_grad_(requires_grad=False)
    kept = model[0].weight.clone()
    state = step(TrainState.create(model, SGD), batch())
    assert torch.equal(state.params["0.weight"], kept)
    assert "0.weight" not in state.slots
    assert list(state.params) == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: TrainState.create(network(), SGD, precision="fp8"),
            "one of fp32, bf16 and fp16, but is 'fp8'",
        ),
        (lambda: TrainState.create(network(), SGD, seed=-1), "seed must be an int"),
        (
            lambda: TrainState.create(network(), SGD, loss_scale=LossScale()),
            "fp16 needs a LossScale and fp32 has none",
        ),
        (lambda: TrainState.create(network().half(), SGD, precision="fp16"), "0.weight is float16"),
        (lambda: TrainState.create(nn.LazyLinear(3), SGD), "weight is lazy"),
        (lambda: TrainState.create(network().to("meta"), SGD), "0.weight is on the meta device"),
        (lambda: TrainState.create(nn.ReLU(), SGD), "nothing to train"),
        (lambda: TrainState.create(network().requires_grad_(requires_grad=False), SGD), "nothing to train"),
        (lambda: Optimizer(torch.nn.Linear, lr=1.0), "expected a subclass of torch.optim.Optimizer"),
        (lambda: TrainState.create(network(), Optimizer(torch.optim.SGD, lr=-1.0)), "Invalid learning rate"),
        (lambda: TrainState.create(network(), Optimizer(torch.optim.SGD, rl=1.0)), "SGD refuses this"),
        (
            lambda: TrainState.create(network(), Optimizer(torch.optim.SGD, lr=1.0, no_decay="x*")),
            "takes no parameter",
        ),
        (
            lambda: TrainState.create(network(), Optimizer(torch.optim.SGD, lr=1.0, groups=[("x*", {})])),
            "takes no parameter that is left",
        ),
        (
            lambda: TrainState.create(
                network(), Optimizer(torch.optim.SGD, lr=1.0, groups=[("0.*", {"beta": 1})])
            ),
            "SGD has no hyperparameter 'beta'",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(make, says):
    with pytest.raises(ConfigError) as caught:
        make()
    assert says in str(caught.value)


def test_a_state_cannot_be_half_fp16():
    state = TrainState.create(network(), SGD, precision="fp16")
    with pytest.raises(ConfigError, match="fp16 needs a LossScale"):
        attrs.evolve(state, scale=None)


def test_groups_take_their_parameters_once_and_no_decay_sets_weight_decay_to_zero():
    optimizer = Optimizer(
        torch.optim.AdamW, lr=0.1, weight_decay=0.5, no_decay=True, groups=[("4.*", {"lr": 0.01})]
    )
    state = TrainState.create(network(), optimizer)
    groups = dict(zip(state.machine.group_names, state.hyper, strict=True))
    assert {names: (h["lr"], h["weight_decay"]) for names, h in groups.items()} == {
        ("0.weight",): (0.1, 0.5),
        ("0.bias", "1.weight", "1.bias"): (0.1, 0.0),
        ("4.weight",): (0.01, 0.5),
        ("4.bias",): (0.01, 0.0),
    }
    assert repr(optimizer).startswith("Optimizer(AdamW, lr=0.1, weight_decay=0.5, no_decay=True, groups=")


def test_hyper_holds_values_and_no_word_of_how_the_optimizer_computes():
    state = TrainState.create(network(), Optimizer(torch.optim.AdamW, lr=0.1))
    assert {"foreach", "fused", "capturable", "differentiable", "params"}.isdisjoint(state.hyper[0])
    assert state.learning_rate == 0.1


@pytest.mark.parametrize(
    "register",
    [
        lambda optimizer: optimizer.register_step_pre_hook,
        lambda optimizer: optimizer.register_step_post_hook,
        lambda _: register_optimizer_step_pre_hook,
        lambda _: register_optimizer_step_post_hook,
    ],
    ids=["before", "after", "before any", "after any"],
)
def test_a_step_hook_of_the_optimizer_is_called(register):
    state = TrainState.create(network(), SGD)
    seen = []
    handle = register(state.machine.optimizer)(lambda *_: seen.append(1))
    try:
        state = step(state, batch())
    finally:
        handle.remove()
    step(state, batch())
    assert seen == [1]


def test_copying_a_trained_model_copies_no_claim_to_its_values():
    import copy

    state = TrainState.create(network(), SGD)
    twin = copy.deepcopy(state.model)
    other = step(TrainState.create(twin, SGD), batch())
    assert other.model is twin
    assert first_difference(dict(state.params), dict(other.params)) is not None


def test_a_model_that_is_saved_whole_and_loaded_belongs_to_nobody():
    state = step(TrainState.create(network(), SGD), batch())
    file = io.BytesIO()
    torch.save(state.model, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    other = TrainState.create(twin, SGD)
    assert all(other.params[name] is p for name, p in twin.named_parameters())
    assert first_difference(dict(state.params), dict(other.params)) is None


def handed_on(state, by):
    state.lease.tear()
    return state.replace(generation=state.lease.hand_on(by))


def test_a_state_spent_by_another_function_names_it():
    """Of those in between nothing is known but that they were steps."""
    state = TrainState.create(network(), SGD)
    second = handed_on(state, "update_ema")
    with pytest.raises(
        SpentStateError, match=r"^params: this state is spent: update_ema at attempted step 0 "
    ):
        _ = state.params
    handed_on(second, "update_ema")
    with pytest.raises(SpentStateError, match=r"^params: this state is spent: optimizer_step at "):
        _ = state.params


def test_tensors_that_were_half_updated_belong_to_no_state_that_ever_had_them():
    first = TrainState.create(network(), SGD)
    second = step(first, batch())
    second.lease.tear()
    assert not first.alive
    assert not second.alive


def factors(optimizer):
    return TrainState.create(network(), optimizer).machine.rate_factors


def test_a_group_keeps_its_proportion_to_the_rate_of_the_optimizer():
    head = [("4.*", {"lr": 0.05})]
    assert factors(Optimizer(torch.optim.SGD, lr=0.1, groups=head)) == (1.0, 0.5)
    assert factors(Optimizer(torch.optim.SGD, lr=torch.tensor(0.1), groups=head)) == pytest.approx((1.0, 0.5))
    # a rate of 0 is in no proportion to another
    assert factors(Optimizer(torch.optim.SGD, lr=0.0, groups=head)) == (1.0, 1.0)
    assert factors(Optimizer(torch.optim.SGD, groups=head)) == pytest.approx((1.0, 0.05 / 1e-3))


class Unrated(torch.optim.Optimizer):
    """An optimizer without a learning rate, as those are that find it themselves; keeps new slots at every step."""

    def __init__(self, params, weight_decay=0.0):
        super().__init__(params, {"weight_decay": weight_decay})

    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"seen": self.state[p].get("seen", 0) + 1}
                p.data.sub_(p.grad)


def test_an_optimizer_of_somebody_else_may_have_no_rate_and_put_new_slots_in_place_of_the_old():
    optimizer = Optimizer(Unrated, groups=[("4.*", {"weight_decay": 0.1})])
    assert factors(optimizer) == (1.0, 1.0)
    state = step(step(TrainState.create(network(), optimizer), batch()), batch())
    assert state.slots["0.weight"] == {"seen": 2}
    assert TrainState.create(network(), SGD).machine.third_party is False
    assert state.machine.third_party is True


def test_a_group_is_chosen_by_patterns_or_by_name_and_tensor():
    def names(*selectors, **options):
        groups = [(selector, {}) for selector in selectors]
        state = TrainState.create(network(), Optimizer(torch.optim.SGD, lr=0.1, groups=groups, **options))
        return state.machine.group_names

    everything = ("0.weight", "0.bias", "1.weight", "1.bias", "4.weight", "4.bias")
    assert names() == (everything,)
    assert names("0.*", ["1.*", "4.bias"]) == (("4.weight",), everything[:2], (*everything[2:4], "4.bias"))
    assert names(lambda name, p: name == "0.bias" and p.shape == (6,)) == (
        ("0.weight", *everything[2:]),
        ("0.bias",),
    )
    assert names("*.bias", "0.*", no_decay="4.*") == (
        ("1.weight",),
        ("4.weight",),
        ("0.bias", "1.bias"),
        ("4.bias",),
        ("0.weight",),
    )


def test_settling_reads_what_is_on_the_device_and_nothing_else():
    state = TrainState.create(network(), SGD, precision="fp16")
    assert state.settle() is state
    scale = attrs.evolve(state.scale, scale=torch.tensor(8.0), growth_tracker=torch.tensor(2))
    state = state.replace(
        applied_steps=torch.tensor(3),
        nonfinite_steps=torch.tensor(1),
        scale=scale,
        flight=state.flight.replace(finite=torch.zeros(()) < 1),
    )
    settled = state.settle()
    assert (settled.applied_steps, settled.nonfinite_steps, settled.finite) == (3, 1, True)
    assert {type(settled.applied_steps), type(settled.nonfinite_steps)} == {int}
    assert type(settled.finite) is bool
    assert settled.scale == LossScale(scale=8.0, growth_tracker=2)
    assert (type(settled.scale.scale), type(settled.scale.growth_tracker)) == (float, int)


def test_a_clone_shares_no_tensor_and_differs_in_no_bit():
    state = step(TrainState.create(network(), SGD, ema=True), batch())
    twin = state.clone()
    for name in ("params", "buffers", "slots", "ema"):
        ours, theirs = dict(getattr(state, name)), dict(getattr(twin, name))
        assert first_difference(ours, theirs) is None
        places = [{t.data_ptr() for _, t in named_leaves(tree)} for tree in (ours, theirs)]
        assert places[0].isdisjoint(places[1])


def test_a_clone_has_no_graph_to_differentiate():
    """That of the loss belongs to the parameters of the state that it was computed from."""
    state = forward_loss(TrainState.create(network(), SGD), batch(), objective)
    with pytest.raises(StepOrderError, match="no loss to differentiate"):
        backward_scaled(state.clone())
    backward_scaled(state)


def test_tensors_whose_memory_nobody_can_look_at_share_none():
    meta, sparse = torch.ones(3, device="meta"), torch.ones(3).to_sparse()
    assert shared_memory({"a": meta, "b": torch.ones(3, device="meta")}, {}) is None
    assert shared_memory({"a": torch.ones(3)}, {"b": sparse, "c": torch.empty(0)}) is None
    model = nn.Linear(2, 1)
    model.register_buffer("links", sparse)
    assert TrainState.create(model, SGD).buffers["links"] is sparse


def test_a_clone_of_a_state_whose_gradients_were_given_away_has_none_to_give():
    state = backward_scaled(forward_loss(TrainState.create(network(), SGD), batch(), objective))
    twin = state.clone()
    unscale_and_clip(state, max_norm=1.0)
    with pytest.raises(SpentStateError, match="given to unscale_and_clip"):
        _ = state.clone().grads
    assert all(grad is not state.flight.grads.values[i] for i, grad in enumerate(twin.grads.values()))


class Bare(torch.optim.SGD):
    """An optimizer that does not let torch wrap its step."""

    def _patch_step_function(self):
        self._zero_grad_profile_name = "Bare"

    def step(self):
        self.taken = True


def test_torchs_wrapper_of_a_step_is_left_out_where_there_is_one(monkeypatch):
    """It opens a profiler's record and walks over hooks: half the time of a step on a small model."""
    recorded = []

    def record(name):
        recorded.append(name)
        return nullcontext()

    state = TrainState.create(network(), SGD)
    monkeypatch.setattr(torch.autograd.profiler, "record_function", record)
    state = step(state, batch())
    assert recorded == []
    state.machine.optimizer.register_step_post_hook(lambda *_: None)
    step(state, batch())
    assert recorded == ["Optimizer.step#SGD.step"]
    bare = TrainState.create(network(), Optimizer(Bare, lr=0.1))
    step(bare, batch())
    assert bare.machine.optimizer.taken


def test_a_machine_is_lent_only_where_another_living_state_has_it():
    """Its own state steps on it as it is: lending is an assignment for every tensor, twice a step."""
    state = TrainState.create(network(), SGD)
    machine, other = state.machine, state.clone()
    for s, lent in ((state, False), (other, True)):
        put_back = machine.point_optimizer(s.lease, s.tensors, s.hyper)
        assert (put_back is not None) is lent
        if lent:
            put_back()
        params = machine.module.point(s.lease, s.tensors.params)
        assert (params is not None) is lent
    machine.module.place_params(params)
    assert machine.optimizer.param_groups[0]["params"][0] is state.params["0.weight"]


def test_what_does_not_match_is_not_stepped_on():
    """Half of a model would be trained, and nobody would notice."""
    state = unscale_and_clip(
        backward_scaled(forward_loss(TrainState.create(network(), SGD), batch(), objective)), max_norm=1.0
    )
    for wrong in (
        state.replace(hyper=state.hyper * 2),
        with_flight(state, grads=Gradients(state.flight.grads.values[:-1])),
    ):
        with pytest.raises(ValueError, match=r"^zip\(\) argument 2 is "):
            optimizer_step(wrong)
    with pytest.raises(ValueError, match=r"^zip\(\) argument 2 is longer"):
        unscale_and_clip(
            with_flight(state, grads=Gradients(state.flight.grads.values[:-1]), grad_norm=None), adaptive=0.1
        )
    with pytest.raises(ValueError, match=r"^zip\(\) argument 2 is shorter"):
        schedule(state.replace(hyper=state.hyper * 2), lambda step: 0.1)
    other = state.clone()
    state.machine.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    with pytest.raises(ValueError, match=r"^zip\(\) argument 2 is shorter"):
        optimizer_step(other)


class Skipping(Unrated):
    """Reads on the device whether to step, as torch's fused ones do."""

    _step_supports_amp_scaling = True

    def step(self):
        if not self.found_inf:
            super().step()


def test_a_fused_optimizer_of_somebody_else_may_put_new_slots_in_place_of_the_old_too():
    state = TrainState.create(network(), Optimizer(Skipping))
    state = unscale_and_clip(backward_scaled(forward_loss(state, batch(), objective)), max_norm=1.0)
    after = optimizer_step(with_flight(state, finite=torch.tensor([True])[0]), donate=False)
    assert after.slots["0.weight"] == {"seen": 1}
    skipped = optimizer_step(with_flight(state, finite=torch.tensor([False])[0]))
    assert skipped.slots["0.weight"] == {}
    assert (after.step, skipped.step) == (1, 0)


@pytest.mark.parametrize(
    ("options", "device", "expected"),
    [
        ({}, "cpu", (False, None)),
        ({"fused": False}, "cpu", (False, False)),
        ({"fused": True}, "cpu", (None, True)),
        ({"foreach": True}, "cpu", (True, None)),
        ({}, "meta", (None, None)),
    ],
)
def test_how_an_optimizer_computes_is_decided_once_and_on_a_cpu_only(options, device, expected):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1, **options)
    settle_implementation(optimizer, torch.device(device))
    group = optimizer.param_groups[0]
    assert (group["foreach"], group["fused"]) == expected


def test_a_device_has_a_generator_of_its_own_beside_the_hosts(monkeypatch):
    """As a GPU has: the names stand for generators that only a machine with one has."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "default_generators", ("the first", "the second"))
    monkeypatch.setattr(torch.mps, "_get_default_mps_generator", lambda: "Apple's")
    host = torch.default_generator
    assert generators_of(torch.device("cpu")) == (host,)
    assert generators_of(torch.device("cuda")) == (host, "the second")
    assert generators_of(torch.device("cuda:0")) == (host, "the first")
    assert generators_of(torch.device("mps")) == (host, "Apple's")
