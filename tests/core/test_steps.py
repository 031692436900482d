"""The step functions: order, ownership of gradients, what they leave alone, what they say when refused."""

import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from state_helpers import with_flight
from torch import nn
from torch.utils.checkpoint import checkpoint

import steploop.core.steps.backward_pass
import steploop.core.steps.clip
import steploop.core.steps.clipping
from steploop import (
    LossScale,
    Optimizer,
    TrainState,
    accumulate,
    accuracy,
    backward_scaled,
    evaluate,
    forward_loss,
    one_cycle,
    optimizer_step,
    schedule,
    unscale_and_clip,
    update_ema,
)
from steploop.core.seeds import fold_in
from steploop.core.state.surroundings import DefaultDtype
from steploop.core.state.trace import TracedCount
from steploop.core.steps.backward_pass import seed_of
from steploop.core.steps.set_rates import _Table
from steploop.core.steps.update import first_nonfinite
from steploop.core.trees import first_difference
from steploop.errors import (
    ConfigError,
    EmptyDataError,
    NonFiniteError,
    ObjectiveError,
    OutOfMemoryError,
    SpentStateError,
    StepOrderError,
)
from steploop.testing import strategies
from steploop.testing.strategies import classification

SGD = Optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def batch(size=7):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, 4, generator=generator), torch.randint(3, (size,), generator=generator)


def objective(model, batch):
    logits = model(batch[0])
    return F.cross_entropy(logits, batch[1]), {"logits": logits}


def fresh(**options):
    return TrainState.create(network(), SGD, **options)


def grads(**options):
    return backward_scaled(forward_loss(fresh(**options), batch(), objective))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: backward_scaled(fresh()), "Call forward_loss(state, batch, objective) before"),
        (lambda: unscale_and_clip(fresh(), max_norm=1.0), "Call backward_scaled(state) before"),
        (lambda: optimizer_step(fresh()), "Call backward_scaled and then unscale_and_clip before"),
        (lambda: optimizer_step(grads()), "Call unscale_and_clip before"),
        (lambda: unscale_and_clip(unscale_and_clip(grads(), max_norm=1.0), max_norm=1.0), "clipped already"),
        (lambda: update_ema(fresh(ema=True), decay=0.9), "Call it after optimizer_step"),
        (lambda: backward_scaled(grads()), "no loss to differentiate"),
    ],
)
def test_a_step_out_of_order_names_what_comes_before(call, says):
    with pytest.raises(StepOrderError) as caught:
        call()
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: unscale_and_clip(grads()), "exactly one of max_norm, max_value and adaptive, but got none"),
        (lambda: unscale_and_clip(grads(), max_norm=1.0, max_value=1.0), "but got max_norm, max_value"),
        (lambda: unscale_and_clip(grads(), max_norm=0.0), "max_norm must be > 0"),
        (lambda: unscale_and_clip(grads(), max_value=-1.0), "max_value must be > 0"),
        (lambda: unscale_and_clip(grads(), adaptive=math.nan), "adaptive must be > 0"),
        (
            lambda: update_ema(optimizer_step(unscale_and_clip(grads(), max_norm=1.0)), decay=0.9),
            "carries no average",
        ),
        *(
            (
                lambda d=d: update_ema(
                    optimizer_step(unscale_and_clip(grads(ema=True), max_norm=1.0)), decay=d
                ),
                f"[0, 1], but is {d}",
            )
            for d in (1.5, -0.1, math.nan)
        ),
        (lambda: evaluate(fresh(), [], objective, {"loss": accuracy}), "give the metric another name"),
        (lambda: evaluate(fresh(), [], objective, use_ema=True), "carries no average"),
        (
            lambda: schedule(
                TrainState.create(network(), Optimizer(torch.optim.Adagrad, lr=0.1)),
                one_cycle(0.1, total_steps=10, momentum=(0.8, 0.9)),
            ),
            "neither momentum nor betas",
        ),
        (lambda: LossScale(scale=0.0), "scale must be a finite number > 0"),
        (lambda: LossScale(growth_factor=1.0), "growth_factor must be > 1"),
        (lambda: LossScale(backoff_factor=1.0), "backoff_factor must be < 1"),
        (lambda: LossScale(floor=-1.0), "floor must be a finite number >= 0"),
    ],
)
def test_an_illegal_argument_is_refused_by_name(call, says):
    with pytest.raises(ConfigError) as caught:
        call()
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (lambda m, b: m(b[0]), "of shape (), but is (7, 3)"),
        (lambda m, b: 1.0, "of shape (), but is float"),
        (lambda m, b: m(b[0]).argmax(), "int64"),
        (lambda m, b: (m(b[0]).sum(), 1, 2, 3), "returned 4 values"),
        (lambda m, b: m(b[0]).sum().detach(), "depends on no parameter"),
    ],
)
def test_an_objective_that_cannot_be_trained_on_is_refused(bad, says):
    with pytest.raises(ObjectiveError) as caught:
        forward_loss(fresh(), batch(), bad)
    assert says in str(caught.value)


def test_gradients_belong_to_the_state_that_unscale_and_clip_returns():
    state = grads()
    assert list(state.grads) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    clipped = unscale_and_clip(state, max_norm=0.01)
    with pytest.raises(SpentStateError, match="given to unscale_and_clip"):
        _ = state.grads
    with pytest.raises(SpentStateError, match="given to unscale_and_clip already"):
        unscale_and_clip(state, max_norm=1.0)
    assert optimizer_step(clipped, donate=False).grads is None
    assert clipped.grads is not None


@pytest.mark.parametrize("there", [True, False], ids=["torch's own shortcut", "without it"])
@given(task=strategies.tasks(), precision=st.sampled_from(["fp32", "fp16"]))
def test_gradients_are_those_of_torch(there, task, precision):
    """Bit for bit, with the function that ``torch.autograd.backward`` calls in the end as with that one itself."""
    start = task.state(precision=precision)
    state = forward_loss(start, task.batch(0), classification)
    loss = forward_loss(start, task.batch(0), classification).flight.graph
    wanted = torch.autograd.grad(loss, state.tensors.leaves, seed_of(state, loss), allow_unused=True)
    with pytest.MonkeyPatch.context() as patch:
        if there:  # or the test would compare a function with itself
            patch.setattr(torch.autograd, "backward", None)
        else:
            patch.setattr(steploop.core.steps.backward_pass, "_engine_run_backward", None)
        found = backward_scaled(state)
    for name, grad in zip(state.machine.trainable, wanted, strict=True):
        assert (name in found.grads) == (grad is not None)
        assert grad is None or first_difference(found.grads[name], grad) is None
    assert all(leaf.grad is None for leaf in state.tensors.leaves)


def test_a_backward_pass_inside_of_a_transform_is_refused_as_torch_refuses_it():
    state = fresh()

    def loss(x):
        return backward_scaled(forward_loss(state, batch(), lambda model, _: model(x).sum())).loss

    with pytest.raises(RuntimeError, match="inside a functorch transform"):
        torch.func.grad(loss)(torch.ones(2, 4))


def test_a_loss_is_differentiated_once():
    state = forward_loss(fresh(), batch(), objective)
    backward_scaled(state)
    with pytest.raises(SpentStateError, match="used up by another backward pass"):
        backward_scaled(state)


def test_no_grad_is_left_behind_and_leftovers_are_not_added():
    model = network()
    state = TrainState.create(model, SGD)
    for p in model.parameters():
        p.grad = torch.full_like(p, 100.0)
    state = backward_scaled(forward_loss(state, batch(), objective))
    expected = grads().grads
    assert all(torch.equal(g, expected[n]) for n, g in state.grads.items())
    assert all(p.grad is None for p in model.parameters())
    optimizer_step(unscale_and_clip(state, max_norm=1.0))
    assert all(p.grad is None for p in model.parameters())


def test_a_parameter_the_loss_does_not_use_has_no_gradient_and_does_not_move():
    model = nn.ModuleDict({"used": nn.Linear(4, 3), "unused": nn.Linear(2, 2)})
    state = TrainState.create(model, Optimizer(torch.optim.SGD, lr=0.1, weight_decay=0.5))
    kept = model["unused"].weight.clone()
    state = backward_scaled(forward_loss(state, batch(), lambda m, b: F.cross_entropy(m["used"](b[0]), b[1])))
    assert list(state.grads) == ["used.weight", "used.bias"]
    state = optimizer_step(unscale_and_clip(state, max_norm=1.0))
    assert torch.equal(state.params["unused.weight"], kept)


def test_what_an_objective_draws_is_a_function_of_seed_attempted_step_and_part():
    """The same in every release: a run that was stopped goes on with the numbers that it would have had."""
    drawn = []

    def draws(model, data):
        drawn.append(torch.rand(3))
        return objective(model, data)

    state = fresh(seed=7).replace(attempted_steps=3)
    forward_loss(state, batch(), draws)
    accumulate(state, [batch(), batch(4)], draws)
    for part, found in zip([0, 0, 1], drawn, strict=True):
        assert torch.equal(found, torch.rand(3, generator=torch.Generator().manual_seed(fold_in(7, 3, part))))


def test_an_objective_may_return_its_loss_alone_or_in_a_tuple():
    alone = forward_loss(fresh(), batch(), lambda m, b: objective(m, b)[0])
    within = forward_loss(fresh(), batch(), lambda m, b: (objective(m, b)[0],))
    assert alone.loss == within.loss
    assert (alone.outputs, within.outputs) == (None, None)


def test_a_forward_pass_leaves_nothing_of_the_step_before():
    state = run_step(fresh(), objective)
    assert None not in (state.grad_norm, state.clipped_norm, state.finite)
    for before in (state, unscale_and_clip(grads(), max_norm=1.0)):
        after = forward_loss(before, batch(), objective)
        assert (after.grads, after.grad_norm, after.clipped_norm, after.finite) == (None, None, None, None)


class Checkpointed(nn.Module):
    """Keeps no activations: computes them again in the backward pass."""

    def __init__(self):
        super().__init__()
        self.body = network()

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=False)


def test_activations_are_computed_again_with_the_parameters_of_their_own_state():
    """Two states over one module, forward and backward interleaved: each gradient is that of its own parameters."""
    one = TrainState.create(Checkpointed(), SGD)
    plain = fresh()
    forward = [forward_loss(state, batch(), objective) for state in (one, run_step(one.clone(), objective))]
    for state, other in zip(forward, (plain, run_step(plain.clone(), objective)), strict=True):
        found = backward_scaled(state).grads
        expected = backward_scaled(forward_loss(other, batch(), objective)).grads
        assert all(torch.equal(grad, expected[name.removeprefix("body.")]) for name, grad in found.items())
        assert one.machine.model.body[0].weight is one.params["body.0.weight"]


def test_a_backward_pass_takes_over_a_module_whose_owner_is_gone():
    owner = fresh()
    model = owner.model
    state = forward_loss(owner.clone(), batch(), objective)
    del owner
    state = backward_scaled(state)
    assert all(state.params[name] is p for name, p in model.named_parameters())


def test_outputs_and_loss_carry_no_graph():
    state = forward_loss(fresh(), batch(), objective)
    assert not state.loss.requires_grad
    assert not state.outputs["logits"].requires_grad
    assert state.loss.shape == ()


def explosive(model, batch):
    loss, outputs = objective(model, batch)
    return loss * math.inf, outputs


def run_step(state, step_objective, **options):
    state = unscale_and_clip(backward_scaled(forward_loss(state, batch(), step_objective)), max_norm=1.0)
    return optimizer_step(state, **options)


def test_a_step_that_is_not_finite_is_counted_and_changes_nothing_else():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    state = TrainState.create(model, SGD, ema=True)
    state = run_step(state, objective)
    kept = {n: t.detach().clone() for n, t in (*state.params.items(), *state.buffers.items())}
    momentum = state.slots["0.weight"]["momentum_buffer"].clone()
    state = update_ema(run_step(state, explosive), decay=0.5)
    assert (state.attempted_steps, state.applied_steps, state.nonfinite_steps, state.batch) == (2, 1, 1, 2)
    assert state.finite is False
    assert all(torch.equal(t, kept[n]) for n, t in (*state.params.items(), *state.buffers.items()))
    assert torch.equal(state.slots["0.weight"]["momentum_buffer"], momentum)
    state = run_step(state, objective)
    assert (state.attempted_steps, state.applied_steps, state.nonfinite_steps) == (3, 2, 0)


def test_too_many_steps_in_a_row_that_are_not_finite_end_with_the_name_of_the_first_gradient():
    state = fresh()
    for _ in range(4):
        state = run_step(state, explosive, max_nonfinite_steps=5)
    state = run_step(state, objective)
    for _ in range(4):
        state = run_step(state, explosive, max_nonfinite_steps=5)
    with pytest.raises(NonFiniteError) as caught:
        run_step(state, lambda m, b: m[2](m[0](b[0]).detach()).sum() * math.nan, max_nonfinite_steps=5)
    text = str(caught.value)
    assert "5 steps in a row" in text
    assert "limit 5" in text
    assert "2.weight" in text
    assert "0.weight" not in text
    last = caught.value.state
    assert text.count(f"up to attempted step {last.attempted_steps}.") == 1
    assert (last.attempted_steps, last.step, last.nonfinite_steps) == (10, 1, 5)
    assert run_step(last, objective).step == 2  # a loop may go on from it


def test_what_is_known_of_a_step_is_plain_where_the_host_may_look():
    state = unscale_and_clip(grads(), max_value=0.01)
    assert state.finite is True
    norms = [g.norm() for g in state.grads.values()]
    assert state.clipped_norm.item() == pytest.approx(torch.stack(norms).norm().item())
    assert state.clipped_norm < state.grad_norm
    for answer in (True, False):  # on a device, where this optimizer cannot skip by itself
        after = optimizer_step(with_flight(state, finite=torch.tensor([answer])[0]), donate=False)
        assert after.finite is answer


def test_a_step_that_is_taken_counts_for_the_loss_scale_and_one_that_is_skipped_backs_it_off():
    state = run_step(fresh(precision="fp16"), objective)
    assert (state.scale.scale, state.scale.growth_tracker) == (2.0**16, 1)
    state = run_step(state, explosive)
    assert (state.scale.scale, state.scale.growth_tracker) == (2.0**15, 0)


def test_a_skipped_step_without_a_forward_pass_before_it_keeps_the_buffers():
    """Gradients may come from elsewhere."""
    state = TrainState.create(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), SGD)
    ready = unscale_and_clip(backward_scaled(forward_loss(state, batch(), objective)), max_norm=1.0)
    state = with_flight(state, grads=ready.flight.grads, grad_norm=ready.grad_norm, finite=False)
    after = optimizer_step(state, donate=False)
    assert list(after.buffers) == list(state.buffers)
    assert after.buffers["1.num_batches_tracked"] == 0


def test_a_limit_of_0_stops_at_the_first_step_that_is_not_finite():
    state = run_step(fresh(), objective, max_nonfinite_steps=0)
    with pytest.raises(NonFiniteError, match=r"^1 step had .* up to attempted step 2\."):
        run_step(state, explosive, max_nonfinite_steps=0)


def test_where_no_gradient_is_held_none_is_the_first_that_is_not_finite():
    assert first_nonfinite(fresh()) == "none (their norm overflows float32)"


def test_the_buffers_of_before_a_step_are_let_go_of_after_it():
    state = TrainState.create(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), SGD)
    before = weakref.ref(state.buffers["1.running_mean"])
    state = run_step(state, objective)
    assert before() is None


def test_what_the_host_last_knew_of_a_count_on_the_device_moves_only_when_it_knows_again(monkeypatch):
    """It is where the table of rates begins."""
    for module in (steploop.core.steps.clipping, steploop.core.steps.clip):
        monkeypatch.setattr(module, "on_host", lambda _: False)
    state = TrainState.create(network(), Optimizer(torch.optim.SGD, lr=0.1, fused=True))
    state = run_step(state.replace(applied_steps=3, attempted_steps=5), objective)
    assert (state.flight.known, int(state.applied_steps)) == ((3, 5), 4)
    state = run_step(state, objective)
    assert (state.flight.known, int(state.applied_steps)) == ((3, 5), 5)
    state = run_step(state.settle(), objective)
    assert (state.flight.known, int(state.applied_steps)) == ((5, 7), 6)


def test_the_default_limit_is_a_hundred():
    state = fresh()
    for _ in range(99):
        state = run_step(state, explosive)
    with pytest.raises(NonFiniteError, match="100 steps in a row"):
        run_step(state, explosive)


def test_schedule_follows_the_steps_taken_and_keeps_groups_in_proportion():
    optimizer = Optimizer(torch.optim.SGD, lr=0.1, groups=[("2.*", {"lr": 0.02})])
    state = TrainState.create(network(), optimizer)
    state = schedule(state, lambda step: 1.0 + step)
    assert [group["lr"] for group in state.hyper] == pytest.approx([1.0, 0.2])
    again = schedule(state, lambda step: 1.0 + step)
    assert again.hyper == state.hyper
    state = schedule(run_step(state, explosive), lambda step: 1.0 + step)
    assert state.learning_rate == 1.0
    state = schedule(run_step(state, objective), lambda step: 1.0 + step)
    assert state.learning_rate == 2.0


def test_a_rate_is_given_to_a_group_as_it_is_or_in_proportion():
    groups = [("0.*", {"lr": 0.2}), ("2.bias", {"lr": 0.3})]
    state = TrainState.create(network(), Optimizer(torch.optim.SGD, lr=0.1, groups=groups))
    state = schedule(state, lambda step: 1)
    assert type(state.hyper[0]["lr"]) is int
    assert [group["lr"] for group in state.hyper] == pytest.approx([1, 2.0, 3.0])


def test_a_schedule_that_cycles_momentum_sets_the_first_beta_and_leaves_the_others():
    optimizer = Optimizer(
        torch.optim.AdamW, lr=0.1, betas=(0.9, 0.97), groups=[("0.*", {"betas": (0.8, 0.96)})]
    )
    cycle = one_cycle(0.1, total_steps=10, momentum=(0.7, 0.75))
    state = schedule(TrainState.create(network(), optimizer), cycle)
    assert [group["betas"] for group in state.hyper] == [(0.75, 0.97), (0.75, 0.96)]


class Trace:
    """Stands for the trace of a step that is being compiled, and notes what it is told."""

    def __init__(self):
        self.told = []

    def schedule(self, state, learning_rate):
        self.told.append((state, learning_rate))
        return "scheduled"

    def limit_nonfinite(self, state, limit):
        self.told.append((state, limit))

    def generators(self, state):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def seed(self, *coordinates):
        self.told.append(("seeds", *coordinates[:1]))

    def counts(self, state, finite):
        return {"applied_steps": state.applied_steps + finite.long(), "nonfinite_steps": 0}


class Counted(TracedCount):
    """``attempted_steps`` of a trace counts on."""

    def __init__(self, trace, offset=0):
        super().__init__(trace)
        self.offset = offset

    def __add__(self, more):
        return Counted(self.trace, self.offset + more)


class Traced(torch.Tensor):
    """A traced tensor is of a class of its own."""


def test_a_step_that_is_traced_leaves_to_the_trace_what_the_host_has_to_do():
    trace = Trace()
    plain = TrainState.create(network(), Optimizer(torch.optim.SGD, lr=0.1))
    state = unscale_and_clip(backward_scaled(forward_loss(plain, batch(), objective)), max_norm=1.0)
    state = state.replace(
        attempted_steps=Counted(trace),
        applied_steps=torch.zeros((), dtype=torch.int64),
        flight=state.flight.replace(finite=torch.tensor(True).as_subclass(Traced)),  # noqa: FBT003  (the value itself)
    )
    # nothing is seeded by a count that is not known: the trace notes where it has to be, for whoever runs the graph
    before = torch.random.get_rng_state()
    assert forward_loss(state, batch(), objective).loss == forward_loss(fresh(), batch(), objective).loss
    assert torch.equal(torch.random.get_rng_state(), before)
    assert trace.told.pop() == ("seeds", 0)
    rate = lambda step: 0.1  # noqa: E731
    assert schedule(state, rate) == "scheduled"
    after = optimizer_step(state, max_nonfinite_steps=7)
    assert trace.told == [(state, rate), (state, 7)]
    assert (after.attempted_steps.offset, int(after.applied_steps)) == (1, 1)


def test_the_rates_on_a_device_are_looked_up_in_a_table_that_is_made_once_for_each_schedule():
    asked = []

    def rate(step):
        asked.append(step)
        return float(step)

    state = with_flight(fresh(), known=(2, 700)).replace(applied_steps=torch.tensor(3), attempted_steps=700)
    assert float(schedule(state, rate).hyper[0]["lr"]) == 3.0
    assert asked == list(range(2, 2 + 1024 + 1))
    later = state.replace(applied_steps=torch.tensor(5))
    assert float(schedule(later, rate).hyper[0]["lr"]) == 5.0
    assert len(asked) == 1025
    assert float(schedule(later, lambda step: step / 2).hyper[0]["lr"]) == 2.5
    # the table ends 1,024 steps after the host last knew the count, which it reads then
    last = state.replace(applied_steps=torch.tensor(2 + 1024), attempted_steps=700 + 1024)
    assert isinstance(schedule(last, rate).applied_steps, torch.Tensor)
    beyond = schedule(last.replace(attempted_steps=700 + 1025), rate)
    assert (beyond.applied_steps, beyond.learning_rate) == (1026, 1026.0)


def test_the_table_of_rates_is_float32_on_the_device_of_the_count():
    with DefaultDtype(torch.float64):
        machine, cycle = fresh().machine, one_cycle(0.1, total_steps=4, momentum=(0.8, 0.9))
        (cycled,) = _Table.of(machine, cycle, 0, torch.device("meta")).groups
        (plain,) = _Table.of(machine, lambda step: 0.5, 0, torch.device("cpu")).groups
    elsewhere = fresh().replace(applied_steps=torch.zeros((), dtype=torch.int64, device="meta"))
    assert schedule(elsewhere, lambda step: 0.5).hyper[0]["lr"].device.type == "meta"
    for values in cycled:
        assert (values.dtype, values.device.type) == (torch.float32, "meta")
    assert (plain[0].dtype, plain[1]) == (torch.float32, None)


def test_out_of_memory_says_the_shapes_of_the_batch_and_leaves_the_state_usable():
    def greedy(model, batch):
        torch.empty(2**60)
        return objective(model, batch)

    state = fresh()
    with pytest.raises(OutOfMemoryError) as caught:
        forward_loss(state, batch(), greedy)
    assert "(7, 4) float32, (7,) int64" in str(caught.value)
    assert run_step(state, objective).applied_steps == 1


class Failing(torch.autograd.Function):
    """The identity, whose backward pass fails as it was told to."""

    @staticmethod
    def forward(ctx, x, fail):
        ctx.fail = fail
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.fail(), None


def fails_backwards(fail):
    return lambda model, batch: Failing.apply(objective(model, batch)[0], fail)


def test_out_of_memory_in_the_backward_pass_leaves_no_gradient_and_the_state_usable():
    def greedy():
        return torch.empty(2**60)

    state = forward_loss(fresh(), batch(), fails_backwards(greedy))
    with pytest.raises(OutOfMemoryError) as caught:
        backward_scaled(state)
    assert str(caught.value) == (
        "A step did not fit into the memory of cpu. The state is as it was. Use smaller batches, accumulate(state, "
        "micro_batches, objective), or precision='bf16'."
    )
    assert all(p.grad is None for p in state.params.values())
    assert run_step(state, objective).applied_steps == 1


def test_other_errors_of_a_backward_pass_come_out_as_they_are_and_leave_no_gradient():
    def broken():
        raise RuntimeError("something else")

    def half(model, batch):
        return objective(model, batch)[0] + Failing.apply(model[0].weight.sum(), broken)

    state = forward_loss(fresh(), batch(), half)
    with pytest.raises(RuntimeError, match=r"^something else$"):
        backward_scaled(state)
    assert all(p.grad is None for p in state.params.values())


def test_what_a_loss_is_differentiated_with_is_kept_from_step_to_step():
    state, loss = fresh(precision="fp16"), torch.ones(())
    seed = seed_of(state, loss)
    assert (seed.item(), seed.dtype, seed.shape) == (2.0**16, torch.float32, ())
    assert seed_of(state, loss) is seed
    assert seed_of(state, loss.double()).dtype is torch.float64
    assert seed_of(state, loss, 0.5).item() == 2.0**15
    assert seed_of(fresh(), loss).item() == 1.0
    assert seed_of(fresh(), loss.double(), torch.tensor(0.5)).dtype is torch.float64
    assert seed_of(fresh(), torch.ones((), device="meta")).device.type == "meta"


def test_nothing_of_a_loss_that_is_being_traced_is_kept():
    """What was made from it is of no use after the trace."""
    state = fresh()
    seed = seed_of(state, torch.ones((), dtype=torch.float64).as_subclass(Traced), 0.5)
    assert (seed.item(), seed.dtype) == (0.5, torch.float64)
    assert seed_of(state, torch.ones((), device="meta").as_subclass(Traced)).device.type == "meta"
    assert not state.machine.seeds


def test_one_sample_in_a_batch_norm_names_the_layer_and_the_remedy():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    state = TrainState.create(model, SGD)
    with pytest.raises(ObjectiveError) as caught:
        forward_loss(state, batch(1), objective)
    text = str(caught.value)
    assert "The layer 1 (BatchNorm1d)" in text
    assert "(1, 4) float32" in text
    assert "drop_last=True" in text
    assert state.buffers["1.num_batches_tracked"] == 0


def test_other_errors_of_an_objective_come_out_as_they_are():
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        forward_loss(fresh(), (torch.randn(3, 9), torch.zeros(3, dtype=torch.int64)), objective)


def test_accumulate_refuses_nothing_to_accumulate_and_weights_it_cannot_know():
    with pytest.raises(EmptyDataError, match="at least one micro-batch"):
        accumulate(fresh(), [], objective)
    with pytest.raises(ObjectiveError, match="Return \\(loss, outputs, weight\\)"):
        accumulate(fresh(), ["text"], lambda m, b: m(batch()[0]).sum())
    with pytest.raises(EmptyDataError, match="sum to 0"):
        accumulate(fresh(), [batch()], lambda m, b: (m(b[0]).sum(), None, 0))


def test_accumulate_weighs_parts_by_what_the_objective_says():
    """Tokens that are ignored count for nothing: the gradient is that of the whole batch."""
    inputs, labels = batch(12)
    labels[[0, 1, 2, 5]] = -100

    def tokens(model, part):
        loss = F.cross_entropy(model(part[0]), part[1], ignore_index=-100)
        return loss, None, (part[1] != -100).sum()

    whole = backward_scaled(forward_loss(fresh(), (inputs, labels), tokens))
    parts = [(inputs[a:b], labels[a:b]) for a, b in ((0, 5), (5, 6 + 1), (7, 12))]
    split = accumulate(fresh(), parts, tokens)
    torch.testing.assert_close(split.loss, whole.loss)
    for name, grad in split.grads.items():
        torch.testing.assert_close(grad, whole.grads[name])


def test_evaluate_weighs_by_sample_and_says_none_for_no_data():
    state = fresh()
    inputs, labels = batch(10)
    whole = evaluate(state, [(inputs, labels)], objective, {"accuracy": accuracy})
    ragged = evaluate(
        state, [(inputs[:7], labels[:7]), (inputs[7:], labels[7:])], objective, {"accuracy": accuracy}
    )
    assert whole["accuracy"] == ragged["accuracy"]
    assert whole["loss"] == pytest.approx(ragged["loss"], rel=1e-6)
    assert evaluate(state, [], objective, {"accuracy": accuracy}) == {"loss": None, "accuracy": None}


def test_a_metric_that_returns_something_else_is_named():
    with pytest.raises(ObjectiveError) as caught:
        evaluate(fresh(), [batch()], objective, {"f1": lambda out, b: 0.5})
    assert "the metric 'f1' must return (sum over the batch, weight), but returned float" in str(caught.value)


def test_evaluate_takes_a_torchmetrics_metric():
    torchmetrics = pytest.importorskip("torchmetrics")
    state, data = fresh(), [batch(10), batch(3)]
    metric = torchmetrics.classification.MulticlassAccuracy(num_classes=3, average="micro")
    found = evaluate(state, data, objective, {"ours": accuracy, "theirs": metric})
    assert found["theirs"] == pytest.approx(found["ours"])


def test_evaluate_reads_the_averaged_weights_when_asked():
    state = fresh(ema=True)
    before = evaluate(state, [batch()], objective)
    state = run_step(state, objective)
    assert evaluate(state, [batch()], objective, use_ema=True) == before
    assert evaluate(state, [batch()], objective) != before
