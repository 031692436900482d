"""What the core says when it refuses: whole sentences, with what was expected, what came and what to do."""

import math

import attrs
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CyclicLR, LambdaLR

from steploop import (
    LossScale,
    Optimizer,
    TrainState,
    backward_scaled,
    cosine_annealing,
    forward_loss,
    from_torch,
    one_cycle,
    optimizer_step,
    schedule,
    unscale_and_clip,
    warmup_cosine,
)
from steploop.core.early_stopping import Best, EarlyStopping, is_better
from steploop.core.plateau import ReduceLROnPlateau
from steploop.core.state.creation import _one_device
from steploop.core.state.module_machine import module_machine
from steploop.core.steps.pass_failures import translated
from steploop.core.validators import boolean, integer, one_of, real
from steploop.data.order import batch_indices, epoch_order
from steploop.errors import (
    ConfigError,
    DataError,
    NonFiniteError,
    ObjectiveError,
    OutOfMemoryError,
    SpentStateError,
    StepOrderError,
)
from steploop.testing import holding
from steploop.testing.strategies import Task, classification

SGD = Optimizer(torch.optim.SGD, lr=0.1)
NAMES = "a.0.weight, a.0.bias, a.1.weight, a.1.bias, a.2.weight, ... (6 in all)"


def made_in_inference_mode():
    with torch.inference_mode():
        return nn.Linear(2, 1)


def create(model=None, optimizer=SGD, **options):
    return TrainState.create(model or nn.Linear(2, 1), optimizer, **options)


def deep():
    model = nn.Module()
    model.a = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    return model


def in_one_memory():
    model = nn.Module()
    model.a = nn.Parameter(torch.zeros(3))
    model.b = nn.Parameter(model.a.detach())
    return model


def five():
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2, bias=False))


def with_loss(objective=classification, **parts):
    task = Task(**parts)
    return forward_loss(task.state(), task.batch(0), objective)


def with_grads():
    return backward_scaled(with_loss())


def frozen():
    model = nn.Linear(2, 1)
    for p in model.parameters():
        p.requires_grad = False
    return model


def moved_twice():
    model = nn.Linear(2, 1)
    first = create(model)
    try:
        create(model, device="cpu")
    finally:
        assert first.alive


def sum_of_outputs(model, batch):
    return model(batch[0]).sum(-1)


def used_twice():
    state = with_loss()
    backward_scaled(state)
    backward_scaled(state)


def clipped_twice():
    state = with_grads()
    unscale_and_clip(state, max_norm=1.0)
    unscale_and_clip(state, max_norm=1.0)


def read_after_clipping():
    state = with_grads()
    unscale_and_clip(state, max_norm=1.0)
    _ = state.grads


def used_after_donation():
    state = unscale_and_clip(with_grads(), max_norm=1.0)
    optimizer_step(state)
    _ = state.params


def too_many(scale=None):
    options = {} if scale is None else {"precision": "fp16", "loss_scale": LossScale(scale=scale)}
    state = holding({"good": torch.ones(2), "bad": torch.tensor([math.nan])}, **options)
    optimizer_step(unscale_and_clip(state, max_norm=1.0), max_nonfinite_steps=1)


def norm_overflows():
    state = holding({"w": torch.tensor([3e38, 3e38])})
    optimizer_step(unscale_and_clip(state, max_norm=1.0), max_nonfinite_steps=1)


def one_sample():
    task = Task(batch_norm=True)
    forward_loss(task.state(), task.batch(0, 1), classification)


NOT_FINITE = (
    "1 step had gradients that were not finite (limit 1), up to attempted step 1{}. The first gradient that is "
    "not finite: {}. The parameters are those of the last finite step. Lower the learning rate, clip, or look for a "
    "division or logarithm of 0 in the loss."
)
EXACTLY_ONE = (
    "unscale_and_clip: give exactly one of max_norm, max_value and adaptive, but got {}. max_norm=float('inf') measures the "
    "norm and clips nothing."
)
ONE_LOSS = "An objective's loss must be a floating-point tensor of shape (), but is {}. Reduce it, as with loss.mean()."
SEED = "TrainState.create: seed must be an int in 0 .. 2**63 - 1, but is {}."
HALF = (
    "TrainState.create: weight is {}. precision='fp16' computes in float16 under autocast and keeps parameters in float32: "
    "call model.float() first."
)
CYCLE = {"max_lr": 0.5, "total_steps": 10}
OUT_OF_RANGE = (
    "from_torch: the scheduler must give a finite learning rate >= 0 and a momentum in [0, 1) at every step, got "
    "Rates(learning_rate={}, momentum={}) at step {}. Correct its arguments, or give fewer total_steps."
)


def no_form(step):
    raise ValueError("there is no form X.")


def tabulated(factor_of, **options):
    return from_torch(lambda optimizer: LambdaLR(optimizer, factor_of), 3, **options)


REFUSALS = [
    (lambda: create(seed=-1), ConfigError, SEED.format(-1)),
    (lambda: create(seed=2**63), ConfigError, SEED.format(2**63)),
    (lambda: create(seed=0.5), ConfigError, SEED.format(0.5)),
    (moved_twice, ConfigError, "TrainState.create: another state trains this model; clone or drop that one before moving it."),
    (lambda: create(in_one_memory()), ConfigError, "TrainState.create: a and b lie in the same memory but are two tensors. A step would update it twice, and a copy or a checkpoint would untie them. To share a weight, assign the same Parameter in both places (head.weight = embedding.weight); else give one of them memory of its own with clone()."),
    (lambda: create(nn.Linear(2, 1).half(), precision="fp16"), ConfigError, HALF.format("float16")),
    (lambda: create(nn.Linear(2, 1).bfloat16(), precision="fp16"), ConfigError, HALF.format("bfloat16")),
    (lambda: create(nn.LazyLinear(1)), ConfigError, "TrainState.create: weight is lazy and has no shape yet. Run the model on one batch first."),
    (lambda: create(torch.jit.ScriptModule()), ConfigError, "TrainState.create: the model is a ScriptModule, whose tensors Python cannot exchange. Train the module that it was made of, and script that afterwards."),
    (lambda: create(made_in_inference_mode()), ConfigError, "TrainState.create: weight was made under torch.inference_mode(), and such tensors are never trained. Make the model outside of it."),
    (lambda: create(nn.Linear(2, 1, device="meta")), ConfigError, "TrainState.create: weight is on the meta device. Call model.to_empty(device=...) and initialise it."),
    (lambda: create(loss_scale=LossScale(scale=2.0)), ConfigError, "TrainState: fp16 needs a LossScale and fp32 has none, but precision is 'fp32' and scale is LossScale(scale=2.0, growth_tracker=0, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000, floor=1.0). Make a new state with TrainState.create(..., precision=...)."),
    (lambda: Optimizer("SGD"), ConfigError, "Optimizer: expected a subclass of torch.optim.Optimizer, but got 'SGD'. Pass the class itself, as in Optimizer(torch.optim.SGD, lr=0.1)."),
    (lambda: create(optimizer=Optimizer(torch.optim.SGD, lr=0.1, groups=[("head.*", {})])), ConfigError, "Optimizer: group 0 ('head.*') takes no parameter that is left. The trainable parameters are weight, bias."),
    (lambda: create(deep(), Optimizer(torch.optim.SGD, lr=0.1, groups=[("head.*", {})])), ConfigError, f"Optimizer: group 0 ('head.*') takes no parameter that is left. The trainable parameters are {NAMES}."),
    (lambda: create(five(), Optimizer(torch.optim.SGD, lr=0.1, groups=[("head.*", {})])), ConfigError, "Optimizer: group 0 ('head.*') takes no parameter that is left. The trainable parameters are 0.weight, 0.bias, 1.weight, 1.bias, 2.weight."),
    (lambda: create(optimizer=Optimizer(torch.optim.SGD, lr=0.1, no_decay="head")), ConfigError, "Optimizer: no_decay='head' takes no parameter. The trainable parameters are weight, bias."),
    (lambda: create(frozen()), ConfigError, "Optimizer: the model has no parameter that requires a gradient, so there is nothing to train."),
    (lambda: create(optimizer=Optimizer(torch.optim.SGD, lr=-1.0)), ConfigError, "Optimizer(SGD, lr=-1.0): SGD refuses this: Invalid learning rate: -1.0. It is made of parameter groups and these hyperparameters."),
    (lambda: create(optimizer=Optimizer(torch.optim.SGD, lr=0.1, groups=[("weight", {"beta": 1})])), ConfigError, "Optimizer(SGD, lr=0.1, groups=[('weight', {'beta': 1})]): SGD has no hyperparameter 'beta'. It has: dampening, differentiable, foreach, fused, lr, maximize, momentum, nesterov, weight_decay."),
    (lambda: schedule(create(optimizer=Optimizer(torch.optim.Adagrad, lr=0.1)), one_cycle(0.1, total_steps=5, momentum=(0.8, 0.9))), ConfigError, "schedule: this schedule cycles the momentum, but the optimizer has neither momentum nor betas. Pass momentum=None to the schedule, or use an optimizer that has one."),
    (lambda: backward_scaled(create()), StepOrderError, "backward_scaled: this state has no loss to differentiate. Call forward_loss(state, batch, objective) before."),
    (used_twice, SpentStateError, "backward_scaled: the graph of this loss was used up by another backward pass. Call forward_loss again."),
    (lambda: unscale_and_clip(create(), max_norm=1.0), StepOrderError, "unscale_and_clip: this state has no gradients. Call backward_scaled(state) before."),
    (lambda: unscale_and_clip(unscale_and_clip(with_grads(), max_norm=1.0), max_norm=1.0), StepOrderError, "unscale_and_clip: these gradients are unscaled and clipped already. Call it once, after backward_scaled."),
    (clipped_twice, SpentStateError, "unscale_and_clip: the gradients of this state were given to unscale_and_clip already."),
    (read_after_clipping, SpentStateError, "The gradients of this state were given to unscale_and_clip, which works on them in place. Read them from the state that it returned."),
    (lambda: unscale_and_clip(with_grads()), ConfigError, EXACTLY_ONE.format("none")),
    (lambda: unscale_and_clip(with_grads(), max_norm=1.0, adaptive=1.0), ConfigError, EXACTLY_ONE.format("max_norm, adaptive")),
    (lambda: unscale_and_clip(with_grads(), max_value=0.0), ConfigError, "unscale_and_clip: max_value must be > 0 (inf measures the norm and clips nothing), but is 0.0."),
    (lambda: unscale_and_clip(with_grads(), max_norm=math.nan), ConfigError, "unscale_and_clip: max_norm must be > 0 (inf measures the norm and clips nothing), but is nan."),
    (lambda: optimizer_step(create()), StepOrderError, "optimizer_step: this state has no unscaled gradients. Call backward_scaled and then unscale_and_clip before."),
    (lambda: optimizer_step(with_grads()), StepOrderError, "optimizer_step: this state has no unscaled gradients. Call unscale_and_clip before."),
    (used_after_donation, SpentStateError, "params: this state is spent: optimizer_step at attempted step 0 updated its tensors in place and gave them to the state it returned. Go on with that one, keep a copy beforehand with state.clone(), or leave the old state whole with optimizer_step(state, donate=False)."),
    (too_many, NonFiniteError, NOT_FINITE.format("", "bad")),
    (lambda: too_many(8.0), NonFiniteError, NOT_FINITE.format(", loss scale 4", "bad")),
    (norm_overflows, NonFiniteError, NOT_FINITE.format("", "none (their norm overflows float32)")),
    (lambda: with_loss(lambda model, batch: ()), ObjectiveError, "An objective returns loss, (loss, outputs) or (loss, outputs, weight), but returned 0 values."),
    (lambda: with_loss(lambda model, batch: (1, 2, 3, 4)), ObjectiveError, "An objective returns loss, (loss, outputs) or (loss, outputs, weight), but returned 4 values."),
    (lambda: with_loss(sum_of_outputs), ObjectiveError, ONE_LOSS.format("(4,) torch.float32")),
    (lambda: with_loss(lambda model, batch: batch[1][0]), ObjectiveError, ONE_LOSS.format("() torch.int64")),
    (lambda: with_loss(lambda model, batch: 0.5), ObjectiveError, ONE_LOSS.format("float")),
    (lambda: with_loss(lambda model, batch: torch.ones(())), ObjectiveError, "The loss depends on no parameter that requires a gradient: it was detached, computed under torch.no_grad(), or does not use the model that the objective was given."),
    (one_sample, ObjectiveError, "The layer norm (BatchNorm1d) needs more than one value per channel in training, but the batch holds (1, 3) float32, (1,) int64. Drop the short last batch (drop_last=True) or use larger batches."),
    (lambda: from_torch("StepLR", 3), ConfigError, "from_torch: make_scheduler must be a function from an optimizer to a torch scheduler, got 'StepLR'. Give for instance lambda optimizer: StepLR(optimizer, step_size=30)."),
    (lambda: from_torch(lambda optimizer: None, 3), ConfigError, "from_torch: make_scheduler must return a torch.optim.lr_scheduler.LRScheduler, got None. Return the scheduler that it builds."),
    (lambda: from_torch(torch.optim.lr_scheduler.ReduceLROnPlateau, 3), ConfigError, "from_torch: make_scheduler must return a scheduler that is a function of the step, got ReduceLROnPlateau, which follows a metric. Use steploop.core.plateau.ReduceLROnPlateau, a fold over the metric."),
    (lambda: tabulated([1.0, 1.0].__getitem__), ConfigError, "from_torch: the scheduler must run for total_steps = 3 steps on an SGD of one parameter group, but at step 2 it failed with IndexError: list index out of range. Correct its arguments, give lr a list with the rate of each group, or give fewer total_steps."),
    (lambda: tabulated(no_form), ConfigError, "from_torch: the scheduler must run for total_steps = 3 steps on an SGD of one parameter group, but at step 0 it failed with ValueError: there is no form X. Correct its arguments, give lr a list with the rate of each group, or give fewer total_steps."),
    (lambda: tabulated([1.0, -1.0].__getitem__), ConfigError, OUT_OF_RANGE.format(-0.1, 0.9, 1)),
    (lambda: from_torch(lambda o: CyclicLR(o, 0.1, 0.2, max_momentum=-0.5), 3), ConfigError, OUT_OF_RANGE.format(0.1, -0.5, 0)),
    (lambda: one_cycle(**CYCLE, div_factor=5e-324), ConfigError, "OneCycle: div_factor must be such that max_lr / div_factor is finite (max_lr is 0.5), got 5e-324. Torch's default is 25."),
    (lambda: one_cycle(**CYCLE, final_div_factor=5e-324), ConfigError, "OneCycle: final_div_factor must be such that the last rate is finite (the first is 0.02), got 5e-324. Torch's default is 1e4."),
    (lambda: one_cycle(**CYCLE, momentum=(0.9, 0.8)), ConfigError, "OneCycle: momentum must be None or two numbers (base, max) with 0 <= base <= max < 1, got (0.9, 0.8). Torch's defaults are (0.85, 0.95)."),
    (lambda: cosine_annealing(0.5, total_steps=3, min_lr=0.75), ConfigError, "CosineAnnealing: min_lr must be <= the highest rate (0.5), got 0.75. Lower min_lr or raise the rate."),
    (lambda: warmup_cosine(0.5, warmup_steps=4, total_steps=3), ConfigError, "WarmupCosine: warmup_steps must be <= total_steps (3), got 4. total_steps counts the warmup too."),
    (lambda: ReduceLROnPlateau(lr=0.5, min_lr=0.75), ConfigError, "ReduceLROnPlateau: min_lr must be <= lr (0.5), got 0.75. Lower min_lr or raise lr."),
    (lambda: ReduceLROnPlateau(lr=0.5, threshold=1.0), ConfigError, 'ReduceLROnPlateau: threshold must be below 1 where threshold_mode is "rel", got 1.0. Give threshold_mode="abs" for an amount.'),
    (lambda: EarlyStopping(monitor=""), ConfigError, "EarlyStopping: monitor must be the name of a metric, got ''. Give for instance \"loss\"."),
    (lambda: Best(value=math.nan, step=0), ConfigError, "Best: value must be a number, not NaN, got nan. A metric that is NaN is never the best; None stands for no value yet."),
    (lambda: is_better(1.0, None, "least"), ConfigError, 'is_better: mode must be "min" or "max", got \'least\'. Give "min" for a loss.'),
    (lambda: epoch_order(2**60 - 1, seed=0, epoch=0, shuffle=False), DataError, "the order of 1,152,921,504,606,846,975 samples takes 9,223,372,036,854,775,800 bytes, more than there are: a dataset that is infinite, or whose __len__ says so, has no permutation; make it a Stream with a length of your choice"),
    (lambda: epoch_order(-1, seed=0, epoch=0), ConfigError, "n must be an integer >= 0, got -1."),
    (lambda: batch_indices(torch.arange(4), -1, batch_size=2), ConfigError, "batch must be an integer in 0..1, got -1."),
    # two real devices are more than a test can ask for: the meta device stands for the second
    (lambda: _one_device([torch.zeros(1), torch.zeros(1, device="meta")]), ConfigError, "TrainState.create: expected all parameters and buffers on one device, but found ['cpu', 'meta']. Pass device=... to move them."),
]  # fmt: skip


@pytest.mark.parametrize(("refused", "error", "message"), REFUSALS, ids=range(len(REFUSALS)))
def test_a_refusal_is_a_whole_sentence(refused, error, message):
    with pytest.raises(error) as excinfo:
        refused()
    assert str(excinfo.value) == message


def no_memory(*_):
    raise MemoryError


def stepped(steps, optimizer=None, **options):
    """As many steps as fit, and then one that does not."""
    state = Task().state(optimizer)
    for _ in range(steps):
        state = backward_scaled(forward_loss(state, Task().batch(0), classification))
        state = optimizer_step(unscale_and_clip(state, max_norm=1.0))
    state = backward_scaled(forward_loss(state, Task().batch(0), classification))
    state.machine.optimizer.register_step_pre_hook(no_memory)
    with pytest.raises(OutOfMemoryError) as excinfo:
        optimizer_step(unscale_and_clip(state, max_norm=1.0), **options)
    return state, str(excinfo.value)


UPDATE = (
    "The update of SGD did not fit into the memory of cpu. {} Take an optimizer that keeps less for each parameter, or "
    "freeze some; optimizer_step(state, donate=False) leaves the state whole in any case, for the memory of a copy."
)


def test_an_update_that_does_not_fit_says_whether_the_state_is_whole():
    state, message = stepped(0)
    assert message == UPDATE.format("The state is as it was.")
    assert state.alive
    assert state.lease.torn is False
    for optimizer in (None, SGD):  # with and without a momentum that shows that it is not the first
        state, message = stepped(1, optimizer)
        assert message == UPDATE.format("It was cut off half-way: this state is spent.")
    with pytest.raises(SpentStateError) as excinfo:
        _ = state.params
    assert str(excinfo.value) == (
        "params: this state is spent: an update was cut off in the middle of attempted step 1, and its tensors are half "
        "updated. Go on from a checkpoint, or from a copy that state.clone() or optimizer_step(state, donate=False) left."
    )
    assert stepped(1, donate=False)[0].alive


def test_a_copy_that_does_not_fit_says_how_to_do_without(monkeypatch):
    state = unscale_and_clip(with_grads(), max_norm=1.0)
    monkeypatch.setattr(TrainState, "clone", no_memory)
    with pytest.raises(OutOfMemoryError) as excinfo:
        optimizer_step(state, donate=False)
    assert str(excinfo.value) == (
        "A copy of the state did not fit into the memory of cpu. The state is as it was. optimizer_step(state) needs no copy: "
        "it updates in place."
    )
    assert state.alive
    monkeypatch.setattr(TrainState, "clone", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizer_step(state, donate=False)


def test_a_step_that_does_not_fit_says_the_shapes_of_the_batch_and_what_to_do():
    machine = Task().state().machine
    found = translated(RuntimeError("DefaultCPUAllocator: can't allocate memory"), machine, Task().batch(0))
    assert isinstance(found, OutOfMemoryError)
    assert str(found) == (
        "A step did not fit into the memory of cpu: the batch holds (4, 3) float32, (4,) int64. The state is as it was. Use "
        "smaller batches, accumulate(state, micro_batches, objective), or precision='bf16'."
    )
    assert isinstance(translated(MemoryError(), machine, None), OutOfMemoryError)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("something else"),
        ValueError("something else"),
        RuntimeError("more than 1 value per channel"),
    ],
)
def test_other_errors_are_left_to_torch(error):
    assert translated(error, Task().state().machine, None) is None


def test_where_the_layer_is_not_known_it_is_called_a_batchnorm_layer():
    found = translated(
        ValueError("Expected more than 1 value per channel"), Task().state().machine, [torch.zeros(1)]
    )
    assert str(found).startswith("A BatchNorm layer needs more than one value per channel in training")


def test_a_state_prints_where_it_stands_and_whether_it_is_spent():
    state = Task().state(precision="bf16")
    after = optimizer_step(
        unscale_and_clip(backward_scaled(forward_loss(state, Task().batch(0), classification)), max_norm=1.0)
    )
    assert repr(after) == (
        f"TrainState(step=1, attempted=1, epoch=0, batch=1, loss={float(after.loss):.4g}, lr=0.1, precision='bf16', Network of "
        "31 parameters on cpu)"
    )
    assert repr(state) == (
        "TrainState(step=0, attempted=0, epoch=0, batch=0, lr=0.1, precision='bf16', Network of 31 parameters on cpu) (spent)"
    )


def test_an_optimizer_prints_as_it_was_written():
    optimizer = Optimizer(torch.optim.SGD, lr=0.1, no_decay=True, groups=[("head.*", {"lr": 0.2})])
    assert repr(optimizer) == "Optimizer(SGD, lr=0.1, no_decay=True, groups=[('head.*', {'lr': 0.2})])"


def test_a_part_that_is_thawed_changes_the_layout_of_the_machine():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    model[1].eval()
    first = module_machine(model)
    assert module_machine(model) is first
    model[1].train()
    model[2].eval()
    assert module_machine(model) is not first
    assert (id(model[2]), "eval") in module_machine(model).layout()


def test_from_torch_uses_the_rate_and_momentum_of_sgd_unless_told_otherwise():
    table = from_torch(lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1.0), 2)
    assert table(0) == 0.1


REAL = "a finite number"
CLOSED, OPEN = {"at_least": -1.0, "at_most": 1.5}, {"above": -1.0, "below": 1.5}
BETWEEN = "a finite number >= -1 and <= 1.5"
INSIDE = "a finite number > -1 and < 1.5"


@pytest.mark.parametrize(
    ("check", "choices", "bounds", "value", "expected"),
    [
        (real, (), {}, 1.0, None),
        (real, (), {}, -1e300, None),
        (real, (), {}, 1, REAL),
        (real, (), {}, "1", REAL),
        (real, (), {}, math.inf, REAL),
        (real, (), {}, math.nan, REAL),
        (real, (), CLOSED, -1.0, None),
        (real, (), CLOSED, 1.5, None),
        (real, (), CLOSED, -1.25, BETWEEN),
        (real, (), CLOSED, 1.75, BETWEEN),
        (real, (), OPEN, -0.75, None),
        (real, (), OPEN, 1.25, None),
        (real, (), OPEN, -1.0, INSIDE),
        (real, (), OPEN, 1.5, INSIDE),
        (integer, (), {"at_least": 2}, 2, None),
        (integer, (), {"at_least": 2}, 1, "an integer >= 2"),
        (integer, (), {"at_least": 2}, 3.0, "an integer >= 2"),
        (integer, (), {"at_least": 0}, True, "an integer >= 0"),
        (one_of, ("ab", "c"), {}, "ab", None),
        (one_of, ("ab", "c"), {}, "a", "one of 'ab', 'c'"),
        (one_of, ("ab", "c"), {}, 1, "one of 'ab', 'c'"),
        (boolean, (), {}, False, None),
        (boolean, (), {}, 0, "True or False"),
    ],
)
def test_a_check_says_what_it_expected_what_came_and_what_to_do(check, choices, bounds, value, expected):
    validator = check(*choices, **bounds, hint="Do.")
    Checked = attrs.make_class("Checked", {"x": attrs.field(validator=validator)})  # noqa: N806  (a class)
    if expected is None:
        assert Checked(value).x == value
    else:
        with pytest.raises(ConfigError) as excinfo:
            Checked(value)
        assert str(excinfo.value) == f"Checked: x must be {expected}, got {value!r}. Do."
