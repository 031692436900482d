"""Laws 6 to 9: clipping bounds and turns nothing, nothing that is not finite is stepped on, the scale leaves no trace."""

import math
from functools import partial

import attrs
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from state_helpers import take_step, with_flight

from steploop import (
    LossScale,
    Optimizer,
    backward_scaled,
    constant,
    forward_loss,
    optimizer_step,
    schedule,
    unscale_and_clip,
)
from steploop.core.state.parts import Gradients, TensorValues, field_names
from steploop.core.steps import clip as unscale
from steploop.core.steps import clipping as clip
from steploop.core.steps import selection
from steploop.core.steps import update as updating
from steploop.errors import NonFiniteError
from steploop.testing import (
    check_adaptive_clip_bounds_each_unit,
    check_clip_keeps_direction,
    check_clip_leaves_small_gradients,
    check_clip_norm_equals_torch,
    check_clip_value_equals_torch,
    check_clipping_twice_is_clipping_once,
    check_norm_is_bounded,
    check_only_finite_gradients_are_stepped_on,
    check_scale_changes_no_bit,
    check_scale_follows_torch,
    check_scaled_steps_follow_torch,
    holding,
    in_float32,
    require_same,
    steploop_clip,
    strategies,
)
from steploop.testing.strategies import Task, classification

by_norm, by_value = steploop_clip("max_norm"), steploop_clip("max_value")
finite_trees = strategies.gradient_trees(huge=False, nonfinite=False)
all_trees = strategies.gradient_trees()


@given(grads=finite_trees, max_norm=strategies.bounds())
def test_the_norm_after_clipping_is_at_most_max_norm(grads, max_norm):
    check_norm_is_bounded(by_norm, grads, max_norm)


@given(grads=finite_trees, max_norm=strategies.bounds())
def test_clipping_keeps_the_direction(grads, max_norm):
    check_clip_keeps_direction(by_norm, grads, max_norm)


@given(grads=finite_trees, max_norm=strategies.bounds())
def test_gradients_below_the_bound_stay_as_they_are(grads, max_norm):
    check_clip_leaves_small_gradients(by_norm, grads, max_norm)


@given(grads=finite_trees, bounds=st.tuples(strategies.bounds(), strategies.bounds()))
def test_clipping_at_a_bound_and_then_a_lower_one_is_clipping_at_the_lower_one(grads, bounds):
    check_clipping_twice_is_clipping_once(by_norm, grads, max(bounds), min(bounds))


@given(grads=all_trees, max_norm=strategies.bounds())
def test_clipping_by_norm_equals_torch_on_every_tree(grads, max_norm):
    check_clip_norm_equals_torch(by_norm, grads, max_norm)


@given(grads=all_trees, max_value=strategies.bounds())
def test_clipping_by_value_equals_torch_on_every_tree(grads, max_value):
    check_clip_value_equals_torch(by_value, grads, max_value)


@given(
    data=st.data(),
    params=strategies.gradient_trees(huge=False, nonfinite=False),
    clipping=strategies.bounds(),
)
def test_adaptive_clipping_follows_its_definition_for_every_unit(data, params, clipping):
    grads = data.draw(strategies.gradient_trees(params, huge=False, nonfinite=False))
    check_adaptive_clip_bounds_each_unit(steploop_clip("adaptive", params), grads, params, clipping)


def test_adaptive_clipping_holds_below_the_epsilon_of_torch():
    """Found by the law: a gradient below 1e-6 was clipped as if it were 1e-6."""
    params = {"w": torch.zeros(2, 3)}
    grads = {"w": torch.tensor([[3e-7, 4e-7, 0.0], [0.0, 0.0, 0.0]])}
    clipped = steploop_clip("adaptive", params)(grads, 1e-4)["w"]
    assert clipped[0].norm().item() == pytest.approx(1e-7, rel=1e-5)
    assert clipped[1].tolist() == [0.0, 0.0, 0.0]


@given(grads=all_trees)
def test_the_norm_before_and_after_clipping_are_what_they_say(grads):
    """``grad_norm`` is torch's; ``clipped_norm`` is the norm of what is stepped on."""
    state = unscale_and_clip(holding(grads), max_norm=0.5)
    expected = torch.nn.utils.get_total_norm(grads.values())
    require_same(state.grad_norm, expected, "grad_norm is torch's")
    assert state.finite == math.isfinite(expected)
    if state.finite:
        found = torch.nn.utils.get_total_norm(state.grads.values()).item()
        assert float(state.clipped_norm) == pytest.approx(found, rel=1e-5, abs=1e-30)


BOUNDS = st.sampled_from([{"max_norm": 1.0}, {"max_norm": math.inf}, {"max_value": 0.1}, {"adaptive": 0.1}])


# The gradients of these laws are given: there is no loss that an optimizer could evaluate again.
without_closure = strategies.optimizers().filter(lambda o: o.torch_class is not torch.optim.LBFGS)


@given(grads=all_trees, bound=BOUNDS, optimizer=without_closure, data=st.data())
def test_nothing_that_is_not_finite_is_ever_stepped_on(grads, bound, optimizer, data):
    precision = data.draw(st.sampled_from(["fp32", "bf16", "fp16"]))
    options = {"loss_scale": data.draw(strategies.loss_scales())} if precision == "fp16" else {}
    state = holding(grads, optimizer=optimizer, precision=precision, **options)
    check_only_finite_gradients_are_stepped_on(state, **bound)


def test_too_many_steps_in_a_row_that_are_not_finite_stop_the_run():
    state = holding({"good": torch.ones(2), "bad": torch.tensor([1.0, math.nan])})
    for _ in range(2):
        grads = state.flight.grads
        state = optimizer_step(unscale_and_clip(state, max_norm=1.0), max_nonfinite_steps=3)
        state = with_flight(state, grads=grads, grad_norm=None)
        state.flight.grads.taken_by = None
    with pytest.raises(NonFiniteError, match=r"^3 steps in a row .*limit 3.*: bad\."):
        optimizer_step(unscale_and_clip(state, max_norm=1.0), max_nonfinite_steps=3)


@given(task=strategies.tasks(), data=st.data(), finite=st.booleans())
def test_a_step_that_selects_is_the_step_that_decides(task, data, finite):
    """Where nobody may look at the answer, as in a compiled step, both outcomes are computed and one is taken."""
    kinds = strategies.optimizers(task.model()).filter(lambda o: o.torch_class is not torch.optim.LBFGS)
    state = task.state(data.draw(kinds))
    state = optimizer_step(
        unscale_and_clip(backward_scaled(forward_loss(state, task.batch(0), classification)), max_norm=1.0)
    )
    state = unscale_and_clip(
        backward_scaled(forward_loss(state, task.batch(1), classification)), max_norm=1.0
    )
    decided, selected = state.clone(), state.clone()
    expected = updating._decided(decided, None, finite=finite)
    found = selection.selected(selected, torch.tensor(finite))
    for name in field_names(TensorValues):
        require_same(
            getattr(found["tensors"], name), getattr(expected["tensors"], name), f"the {name} are the same"
        )
    counts = expected.get("applied_steps", state.applied_steps), expected["nonfinite_steps"]
    assert (int(found["applied_steps"]), int(found["nonfinite_steps"])) == counts


def test_sparse_gradients_are_clipped_by_the_norm_of_their_values():
    """As an Embedding(sparse=True) gives them; the same rows twice count together."""
    indices = torch.tensor([[0, 2, 0]])
    rows = torch.tensor([[3.0, 0.0], [0.0, 4.0], [3.0, 0.0]])
    sparse = torch.sparse_coo_tensor(indices, rows, (4, 2), check_invariants=True)
    state = holding({"w": torch.ones(4, 2)}, optimizer=Optimizer(torch.optim.SGD, lr=1.0))
    state = with_flight(state, grads=Gradients([sparse]))
    state = unscale_and_clip(state, max_norm=1.0)
    assert state.grad_norm.item() == pytest.approx((6.0**2 + 4.0**2) ** 0.5)
    assert state.grads["w"].to_dense().norm().item() == pytest.approx(1.0, rel=1e-5)
    stepped = optimizer_step(state)
    assert stepped.params["w"][1].tolist() == [1.0, 1.0]
    assert stepped.params["w"][2].tolist() == pytest.approx([1.0, 1.0 - 4.0 / 52**0.5])


def test_sparse_and_dense_gradients_have_one_norm():
    sparse = torch.sparse_coo_tensor([[0, 2]], [[3.0, 0.0], [0.0, 4.0]], (4, 2), check_invariants=True)
    assert clip.global_norm([sparse, torch.tensor([12.0])]).item() == pytest.approx(13.0)


def test_where_no_parameter_has_a_gradient_the_norm_is_0():
    """The loss may depend on a tensor outside of the model alone; an optimizer takes such a step."""
    state = holding({"w": torch.ones(2)}, precision="fp16")
    for bound in ({"max_norm": 1.0}, {"max_value": 1.0}, {"adaptive": 1.0}):
        found = unscale_and_clip(with_flight(state, grads=Gradients([None])), **bound)
        assert found.grad_norm.shape == ()
        assert (found.grad_norm.item(), found.clipped_norm, found.finite) == (0.0, 0.0, True)
    assert optimizer_step(found).params["w"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("scale", [0.25, 0.5, 1.0, 2.0, 4.0])
def test_gradients_are_divided_by_the_scale_whatever_it_is(scale):
    grads = torch.tensor([3.0, -4.0])
    state = holding({"w": grads * scale}, precision="fp16", loss_scale=LossScale(scale=scale))
    state = unscale_and_clip(state, max_norm=math.inf)
    assert state.grads["w"].tolist() == [3.0, -4.0]
    assert state.grad_norm.item() == 5.0


SOME = st.sampled_from([0.0, 1e-30, 1e-3, 0.4, 0.5, 0.6, 1e3, 3e38, math.inf, math.nan])


@pytest.mark.parametrize("seen", [True, False])
def test_the_norm_of_what_was_clipped_is_the_bound(seen, monkeypatch):
    if not seen:
        for module in (clip, unscale):
            monkeypatch.setattr(module, "on_host", lambda _: False)
    state = unscale_and_clip(holding({"w": torch.tensor([3.0, -4.0])}), max_norm=2.0)
    assert state.grad_norm.item() == 5.0
    assert float(state.clipped_norm) == pytest.approx(2.0, rel=1e-6)
    assert state.grads["w"].tolist() == pytest.approx([1.2, -1.6], rel=1e-6)


@example(entries=[1e3, 0.5], max_norm=0.5)
@example(entries=[0.4], max_norm=1.0)
@given(entries=st.lists(SOME, min_size=1, max_size=3), max_norm=st.sampled_from([0.5, 1.0, 1e36, math.inf]))
def test_clipping_where_the_host_does_not_look_is_clipping_where_it_does(entries, max_norm):
    """The path of a GPU: the factor is a tensor, and nothing is decided by an ``if``."""
    grads = {"w": torch.tensor(entries), "v": torch.tensor([[0.1]])}
    seen = unscale_and_clip(holding(grads), max_norm=max_norm)
    with pytest.MonkeyPatch.context() as patch:
        for module in (clip, unscale):
            patch.setattr(module, "on_host", lambda _: False)
        unseen = unscale_and_clip(holding(grads), max_norm=max_norm)
    require_same(dict(unseen.grads), dict(seen.grads), "the gradients are the same")
    require_same(unseen.grad_norm, seen.grad_norm, "the norm is the same")
    assert isinstance(unseen.finite, torch.Tensor)
    assert bool(unseen.finite) == seen.finite
    assert float(unseen.clipped_norm) == pytest.approx(float(seen.clipped_norm), rel=1e-6, nan_ok=True)


@given(
    entries=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=4), max_norm=st.sampled_from([0.1, 1.0, 1e30])
)
def test_gradients_in_float64_are_clipped_in_float64_as_torchs_are(entries, max_norm):
    grads = torch.tensor(entries, dtype=torch.float64)
    state = unscale_and_clip(holding({"w": grads}), max_norm=max_norm)
    theirs = torch.nn.Parameter(torch.zeros_like(grads))
    theirs.grad = grads.clone()
    norm = torch.nn.utils.clip_grad_norm_([theirs], max_norm)
    require_same(state.grad_norm, norm, "the norm is torch's")
    require_same(state.grads["w"], theirs.grad, "the gradients are torch's")


@pytest.mark.parametrize("bound", [torch.finfo(torch.float32).max, 1e39, math.inf])
def test_an_infinite_entry_is_clipped_at_the_largest_bound_that_float32_holds(bound):
    check_clip_value_equals_torch(by_value, {"w": torch.tensor([math.inf, -math.inf, 1.0])}, bound)


def test_adaptive_clipping_wants_a_parameter_for_every_gradient():
    with pytest.raises(ValueError, match="argument"):
        clip.clip_adaptive([torch.ones(2), torch.ones(2)], [torch.ones(2)], 0.1)


# --- the loss scale -------------------------------------------------------------------------------------------------


def scaled_step(state, batch, *, max_norm):
    def gradients(state):
        state = backward_scaled(forward_loss(state, batch, in_float32(classification)))
        return unscale_and_clip(state, max_norm=max_norm)

    return schedule(take_step(state, gradients), constant(0.05))


@given(
    data=st.data(),
    task=strategies.tasks(),
    scale=strategies.powers_of_two(),
    max_norm=st.sampled_from([0.1, math.inf]),
)
def test_a_power_of_two_as_loss_scale_changes_no_bit(data, task, scale, max_norm):
    state = task.state(data.draw(strategies.optimizers(task.model())), precision="fp16")
    check_scale_changes_no_bit(partial(scaled_step, max_norm=max_norm), state, task.batches(3), scale)


@given(scale=strategies.loss_scales(), finite=st.lists(st.booleans(), max_size=30))
def test_the_scale_follows_grad_scaler_for_every_pattern_of_overflows(scale, finite):
    check_scale_follows_torch(scale, finite)


@given(data=st.data(), scale=strategies.loss_scales(floor=0.0), steps=st.integers(1, 6))
def test_scaled_steps_follow_a_loop_with_grad_scaler(data, scale, steps):
    params = data.draw(strategies.gradient_trees(huge=False, nonfinite=False))
    optimizer = data.draw(without_closure)
    grads = [data.draw(strategies.gradient_trees(params)) for _ in range(steps)]
    check_scaled_steps_follow_torch(optimizer, params, grads, scale)


@given(scale=strategies.loss_scales(), skips=st.integers(1, 200))
def test_the_scale_never_falls_below_its_floor(scale, skips):
    """The one documented deviation: torch's underflows to 0, and the next finite step writes nan."""
    for _ in range(skips):
        scale = scale.updated(finite=False)
    assert float(scale.scale) >= scale.floor


@given(scale=strategies.loss_scales(), finite=st.lists(st.booleans(), max_size=20))
def test_the_scale_is_the_same_where_the_host_does_not_look(scale, finite):
    """As tensors on a device, with the answer on the device too, every value is that of the numbers on the host."""
    on_device = scale
    for good in finite:
        scale = scale.updated(finite=good)
        on_device = on_device.updated(torch.tensor(good))
        assert (float(on_device.scale), int(on_device.growth_tracker)) == (scale.scale, scale.growth_tracker)
        assert float(on_device.inverse()) == float(scale.inverse())


# --- the laws catch what they are there for -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("law", "clip", "message"),
    [
        (check_norm_is_bounded, lambda g, c: {n: t * 0.7 for n, t in g.items()}, "at most max_norm"),
        (
            check_clip_keeps_direction,
            lambda g, c: {n: t.clamp(-c, c) for n, t in g.items()},
            "must keep the direction",
        ),
        (check_clip_keeps_direction, lambda g, c: {n: -t for n, t in g.items()}, r"a number in \[0, 1\]"),
        (
            check_clip_norm_equals_torch,
            lambda g, c: {n: t * (c / 5.0) for n, t in g.items()},
            "must equal torch's: w",
        ),
        (
            check_clip_value_equals_torch,
            lambda g, c: {n: t / 4.0 for n, t in g.items()},
            "must equal torch's: w",
        ),
    ],
)
def test_a_wrong_clip_fails_its_law(law, clip, message):
    with pytest.raises(AssertionError, match=message):
        law(clip, {"w": torch.tensor([3.0, -4.0])}, 1.0)


def test_a_clip_that_scales_small_gradients_too_fails_the_law_of_small_gradients():
    with pytest.raises(
        AssertionError, match="clipping at 10 must not change gradients of norm 5: w: 2 of 2 elements differ"
    ):
        check_clip_leaves_small_gradients(
            lambda g, c: {n: t * 0.5 for n, t in g.items()}, {"w": torch.tensor([3.0, -4.0])}, 10.0
        )


def test_a_clip_of_each_tensor_by_itself_is_caught_when_it_runs_twice():
    def each(grads, bound):
        return {n: t * (0.9 if t.norm() > bound else 1.0) for n, t in grads.items()}

    with pytest.raises(
        AssertionError, match=r"clipping at 2\.0 and then at 1\.0 must equal clipping at 1\.0: w is off"
    ):
        check_clipping_twice_is_clipping_once(each, {"w": torch.tensor([3.0, -4.0])}, 2.0, 1.0)


def test_steps_that_forget_to_unscale_fail_the_law_of_scales():
    def step(state, batch):
        state = backward_scaled(forward_loss(state, batch, in_float32(classification)))
        kept = state.scale
        state = unscale_and_clip(state.replace(scale=attrs.evolve(kept, scale=1.0)), max_norm=math.inf)
        return optimizer_step(state.replace(scale=kept))

    with pytest.raises(
        AssertionError, match=r"a loss scale of 4\.0 must not change a bit of the params: first"
    ):
        check_scale_changes_no_bit(step, Task().state(precision="fp16"), Task().batches(2), 4.0)


def test_a_scale_that_grows_too_early_fails_the_law_of_grad_scaler():
    class Hasty(LossScale):
        def updated(self, finite):
            return attrs.evolve(self, scale=self.scale * 2.0)

    with pytest.raises(AssertionError, match="after step 0 scale and tracker must be torch's"):
        check_scale_follows_torch(Hasty(growth_interval=3), [True])


def test_the_optimizer_that_holding_gives_is_sgd_unless_told_otherwise():
    state = holding({"w": torch.ones(2)}, optimizer=Optimizer(torch.optim.Adam, lr=0.5))
    assert state.learning_rate == 0.5
    assert holding({"w": torch.ones(2)}).learning_rate == 0.1
