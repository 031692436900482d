"""What cannot be captured is refused with the user's line and what to write instead."""

import math

import pytest
import torch
import torch.nn.functional as F
from compiled_runs import assert_alike, batches, first_state, folded, mlp, objective, run_as_it_is, train_step
from torch import nn

from steploop import (
    Optimizer,
    backward_scaled,
    compile,  # noqa: A004  (steploop.compile, as in torch.compile)
    forward_loss,
    optimizer_step,
    schedule,
    unscale_and_clip,
)
from steploop.compilation import compiled_step, inductor
from steploop.errors import CompileError


@pytest.fixture(autouse=True)
def _graphs_run_as_they_are(monkeypatch):
    run_as_it_is(monkeypatch)


def refusal(step, state=None):
    if state is None or state.step == 0:
        state = folded(train_step, state or first_state(), batches(1))  # makes the optimizer's slots
    with pytest.raises(CompileError) as excinfo:
        compile(step)(state, batches(1)[0])
    return str(excinfo.value)


def updated(state):
    return optimizer_step(unscale_and_clip(backward_scaled(state), max_norm=1.0))


def test_reading_the_loss_is_refused_with_the_line():
    def step(state, batch):
        state = train_step(state, batch)
        if state.loss.item() > 3.0:
            return state
        return state

    message = refusal(step)
    assert "test_compilation_errors.py" in message
    assert "    if state.loss.item() > 3.0:\n" in message
    assert "torch.where(condition, a, b)" in message
    assert "mode='auto'" in message


def test_branching_on_a_tensor_in_the_model_is_refused_with_the_line_of_the_model():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 4)

        def forward(self, x):
            y = self.linear(x)
            return y if y.sum() > 0 else -y

    message = refusal(train_step, first_state(Branching()))
    assert "return y if y.sum() > 0 else -y" in message
    assert ", in forward" in message


def test_a_mask_as_an_index_is_refused():
    def masked(model, batch):
        logits = model(batch[0])
        return F.cross_entropy(logits[batch[1] > 0], batch[1][batch[1] > 0])

    message = refusal(lambda state, batch: updated(forward_loss(state, batch, masked)))
    assert "keep shapes fixed" in message
    assert "logits[batch[1] > 0]" in message


def test_going_to_numpy_is_refused():
    def with_numpy(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1]) + float(batch[0].numpy().sum())

    assert "reads a tensor's value in Python" in refusal(lambda s, b: updated(forward_loss(s, b, with_numpy)))


@pytest.mark.parametrize("read", [int, hash, str, repr, float, lambda n: f"{n:04d}", range, math.cos])
@pytest.mark.parametrize("count", ["attempted_steps", "step"])
def test_reading_the_step_count_as_a_number_is_refused_with_forms_that_work(read, count):
    def step(state, batch):
        read(getattr(state, count))
        return train_step(state, batch)

    message = refusal(step)
    assert f"reads state.{count} as a number, which is another one at every step" in message
    assert f"`if state.{count} % k == 0`" in message


def test_reading_the_steps_taken_is_refused():
    def step(state, batch):
        return updated(forward_loss(state, batch, objective)).replace(seed=state.step)

    assert "reads state.step as a number" in refusal(step)


def test_a_state_in_the_middle_of_a_step_is_refused():
    message = refusal(lambda state, batch: backward_scaled(forward_loss(state, batch, objective)))
    assert "returned a state in the middle of a step. Call optimizer_step before returning it." in message


def test_something_else_than_a_state_is_refused():
    assert "must return a TrainState" in refusal(lambda state, batch: None)


def test_two_optimizer_steps_on_one_state_are_refused():
    message = refusal(lambda state, batch: train_step(train_step(state, batch), batch))
    assert "takes 2 optimizer steps on one state" in message


def test_an_optimizer_that_reads_is_named_with_those_that_can_be_captured():
    message = refusal(train_step, first_state(mlp(), Optimizer(torch.optim.Adafactor, lr=0.01)))
    assert "_adafactor.py" in message
    assert "SGD, Adam, AdamW" in message


@pytest.mark.parametrize("draws", [False, True])
def test_a_distribution_that_checks_its_numbers_is_refused_with_what_to_write_and_compiled_so(draws):
    def step_with(**settings):
        def loss(model, batch):
            inputs, labels = batch
            if draws:
                noisy = torch.distributions.Normal(model(inputs), 0.1, **settings).rsample()
                return F.cross_entropy(noisy, labels)
            return -torch.distributions.Categorical(logits=model(inputs), **settings).log_prob(labels).mean()

        return lambda state, batch: updated(forward_loss(state, batch, loss))

    message = refusal(step_with())
    assert "lets a distribution check its numbers in Python" in message
    assert message.count("validate_args=False") == 1
    unchecked = step_with(validate_args=False)
    single, given = folded(unchecked, first_state(), batches(5)), batches(5)
    assert_alike(folded(compile(unchecked), first_state(), given), single, 1e-5)


def test_an_optimizer_that_evaluates_the_loss_again_is_refused():
    class Twice(torch.optim.SGD):
        def step(self, closure):
            closure()
            return super().step(closure)

    def step(state, batch):
        return optimizer_step(state, closure=lambda s: backward_scaled(forward_loss(s, batch, objective)))

    message = refusal(step, folded(step, first_state(mlp(), Optimizer(Twice, lr=0.01)), batches(1)))
    assert "lets Twice evaluate the loss again (optimizer_step(closure=...))" in message


def test_an_optimizer_that_counts_in_python_is_refused():
    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p]["count"] = self.state[p].get("count", 0) + 1
            return super().step(closure)

    message = refusal(train_step, first_state(mlp(), Optimizer(Counting, lr=0.01)))
    assert "uses Counting, which counts in a Python number ('count' of 0.weight)" in message


def test_a_fault_of_the_step_itself_is_shown_with_its_line():
    def step(state, batch):
        return train_step(state, (batch[0] @ batch[0], batch[1]))

    message = refusal(step)
    assert "batch[0] @ batch[0]" in message
    assert "fails where it runs on tensors without values" in message


def test_what_a_schedule_raises_is_shown():
    def broken(step):
        raise ValueError(f"no rate for step {step}")

    def step(state, batch):
        return schedule(updated(forward_loss(state, batch, objective)), broken)

    fast = compile(step)
    with pytest.raises(ValueError, match="no rate for step 1"):
        fast(first_state(), batches(1)[0])
    with pytest.raises(CompileError, match="no rate for step 2"):
        fast(folded(train_step, first_state(), batches(1)), batches(1)[0])


def test_a_refused_step_leaves_state_and_model_as_they_were():
    def step(state, batch):
        state = train_step(state, batch)
        return state if state.loss > 0 else None

    state = folded(train_step, first_state(mlp(norm=True)), batches(2))
    before = state.clone()
    with pytest.raises(CompileError):
        compile(step)(state, batches(1)[0])
    assert all(torch.equal(value, before.params[name]) for name, value in state.params.items())
    assert all(type(value) is torch.Tensor for value in state.model.buffers())
    assert folded(train_step, state, batches(3)).applied_steps == 5


def test_batches_of_odd_things_are_refused():
    with pytest.raises(
        CompileError, match=r"takes batches of tensors, numbers, texts.* but 'batch\.2' is a set"
    ):
        compile(train_step)(first_state(), (*batches(1)[0], {1, 2}))


def test_another_torch_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.99.0+cpu")
    with pytest.raises(
        CompileError, match=r"uses internals of torch 2\.14 and 2\.15, but this is torch 2\.99\.0\+cpu"
    ):
        compile(train_step)
    said = []
    step = compile(train_step, mode="auto", report=said.append)
    assert folded(step, first_state(), batches(3)).step == 3
    assert "goes on in eager" in said[0]
    assert "uses internals of torch 2.14 and 2.15" in said[0]


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.undo()
    torch._inductor.cpp_builder.cpp_compiler_search.cache_clear()
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(CompileError, match=r"needs a C\+\+ compiler .* Install g\+\+"),
    ):
        folded(compile(train_step), first_state(), batches(2))
    torch._inductor.cpp_builder.cpp_compiler_search.cache_clear()
    assert compiled_step.compile_graph is inductor.compile_graph
