"""A module that somebody changes behind its state is refused by name at the next step; so is a loss of another model."""

import re

import pytest
import torch
import torch.nn.functional as F
from module_runs import SGD, batches, create, made, square, step
from torch import nn
from torch.nn.utils import prune

from steploop import TrainState, accumulate, backward_scaled, checkpoint, evaluate, forward_loss
from steploop.core.trees import first_difference
from steploop.errors import ConfigError, ObjectiveError

# -- what others do to the module ---------------------------------------------------------------------------------------


class MakesALayer(nn.Module):
    """Adapts to its input in the first pass, as people write it who do not know of lazy layers."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 3)

    def forward(self, x):
        if not hasattr(self, "head"):
            self.head = nn.Linear(x.shape[1], 2)
        return self.head(self.body(x))


BEHIND = "The model was changed behind the state: {}. A state trains the tensors that it was made with."


def test_a_layer_that_the_first_pass_makes_is_refused_by_name():
    state = create(MakesALayer)
    with pytest.raises(ConfigError, match=re.escape("head.weight, head.bias")) as caught:
        step(state, batches()[0])
    assert str(caught.value).startswith(
        BEHIND.format("it has new layers, parameters or buffers: head.weight, head.bias")
    )


def chain():
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def loads_by_assignment(model):
    model.load_state_dict(made(chain, other=True).state_dict(), assign=True)


def gives_a_parameter(model):
    model[2].weight = nn.Parameter(torch.ones(2, 3))


def gives_a_tied_parameter(model):
    model[2].weight = model[0].weight


def gives_a_head(model):
    model[2] = nn.Linear(3, 2)


def adds_a_layer(model):
    model.append(nn.Linear(2, 2))


def adds_a_layer_without_values(model):
    model.append(nn.Tanh())


def adds_a_buffer(model):
    model.register_buffer("mask", torch.ones(3))


def gives_a_buffer(model):
    model[1].running_mean = torch.ones(3)


def registers_a_buffer_anew(model):
    model[1].register_buffer("running_mean", torch.ones(3))


def removes_a_layer(model):
    del model[2]


def removes_a_parameter(model):
    del model[2].bias


def sets_a_parameter_to_none(model):
    model[2].bias = None


def prunes(model):
    prune.random_unstructured(model[2], "weight", amount=0.5)


def reparametrizes(model):
    nn.utils.parametrizations.weight_norm(model[2])


def moves_the_dtype(model):
    model.double()


def thaws(model):
    model[0].bias.requires_grad_(requires_grad=True)


BEHIND_THE_STATE = [
    (loads_by_assignment, "its parameter 0.weight was replaced by another tensor"),
    (gives_a_parameter, "its parameter 2.weight was replaced by another tensor"),
    (gives_a_tied_parameter, "its parameter 2.weight was replaced by another tensor"),
    (gives_a_head, "its layer '2' was replaced by another one"),
    (adds_a_layer, "it has new layers, parameters or buffers: 3.weight, 3.bias"),
    (adds_a_layer_without_values, "it has new layers, parameters or buffers: 3"),
    (adds_a_buffer, "it has new layers, parameters or buffers: mask"),
    (gives_a_buffer, "its buffer 1.running_mean was replaced by another tensor"),
    (registers_a_buffer_anew, "its buffer 1.running_mean was replaced by another tensor"),
    (removes_a_layer, "layers, parameters or buffers were removed: 2.weight, 2.bias"),
    (removes_a_parameter, "its parameter 2.bias was removed"),
    (sets_a_parameter_to_none, "2.bias"),
    (prunes, "2.weight"),
    (reparametrizes, "2."),
    (
        moves_the_dtype,
        "its parameters were moved: 0.weight is torch.float64 on cpu now, and was torch.float32 on cpu when the state",
    ),
    (thaws, "0.bias requires a gradient, but it did not when the state was made"),
]


def test_a_parameter_that_is_replaced_in_a_plain_list_is_refused_by_name():
    model = chain()
    model.also = [model[2].weight]
    state = step(create(lambda: model), batches()[0])
    model.also[0] = nn.Parameter(torch.ones(2, 3))
    with pytest.raises(ConfigError, match=re.escape("its parameter 2.weight was replaced by another tensor")):
        step(state, batches()[0])


@pytest.mark.parametrize("started", [False, True], ids=["before the first step", "after a step"])
@pytest.mark.parametrize(("change", "says"), BEHIND_THE_STATE, ids=lambda v: getattr(v, "__name__", ""))
def test_a_module_that_is_changed_behind_the_state_is_refused_by_name_at_the_next_step(change, says, started):
    model = made(chain)
    model[0].bias.requires_grad_(requires_grad=False)
    state = TrainState.create(model, SGD)
    if started:
        state = step(state, batches()[0])
    change(state.model)
    with pytest.raises(ConfigError) as caught:
        step(state, batches()[1])
    assert says in str(caught.value), str(caught.value)
    assert "TrainState.create(model" in str(caught.value)


class Tempered(nn.Module):
    def __init__(self):
        super().__init__()
        self.temperature, self.body = nn.Parameter(torch.ones(1)), nn.Linear(3, 2)

    def forward(self, x):
        return self.body(x) * self.temperature


def test_an_equal_tensor_in_the_place_of_a_parameter_of_one_element_is_another_one():
    state = step(create(Tempered), batches()[0])
    state.model.temperature = nn.Parameter(state.params["temperature"].detach().clone())
    with pytest.raises(
        ConfigError,
        match=re.escape(BEHIND.format("its parameter temperature was replaced by another tensor")),
    ):
        step(state, batches()[1])


def test_a_buffer_replaced_before_an_evaluation_is_refused_there():
    state = step(TrainState.create(made(chain), SGD), batches()[0])
    gives_a_buffer(state.model)
    with pytest.raises(ConfigError, match=r"its buffer 1\.running_mean was replaced"):
        evaluate(state, batches(1), square)


def test_a_cache_that_a_call_by_hand_makes_anew_is_no_change():
    """As rotary embeddings do for a longer text: a buffer that no state_dict holds."""

    class Cached(nn.Linear):
        def __init__(self):
            super().__init__(3, 3)
            self.register_buffer("cache", torch.ones(4, 1), persistent=False)

        def forward(self, x):
            if len(x) > len(self.cache):
                self.cache = torch.ones(len(x), 1)
            return super().forward(x) * self.cache[: len(x)]

    data = batches()
    called, expected = (step(TrainState.create(made(Cached), SGD), data[0]) for _ in range(2))
    called.model(torch.ones(9, 3))
    called, expected = step(called, data[1]), step(expected, data[1])
    assert first_difference(called.params, expected.params) is None


def test_after_a_pass_that_failed_a_step_goes_on_as_if_it_had_not_been():
    """The module makes its buffer anew in each pass, and the failed one has done so too."""

    class Moving(nn.Linear):
        def __init__(self):
            super().__init__(3, 3)
            self.register_buffer("mean", torch.zeros(3))

        def forward(self, x):
            self.mean = self.mean * 0.5 + x.mean(0)
            return super().forward(x) - self.mean

    def fails(model, batch):
        square(model, batch)
        raise ValueError("not today")

    data = batches()
    interrupted, expected = (step(TrainState.create(made(Moving), SGD), data[0]) for _ in range(2))
    with pytest.raises(ValueError, match="not today"):
        forward_loss(interrupted, data[2], fails)
    interrupted, expected = step(interrupted, data[1]), step(expected, data[1])
    assert first_difference(interrupted.buffers, expected.buffers) is None


def test_values_that_are_copied_into_the_module_are_the_states():
    """load_state_dict without assign writes into the state's own tensors: what is trained is what is saved."""
    state = create(chain)
    state.model.load_state_dict(made(chain, other=True).state_dict())
    twin = create(chain, other=True)
    state, twin = step(state, batches()[0]), step(twin, batches()[0])
    assert first_difference(dict(state.params), dict(twin.params)) is None
    assert checkpoint.digest(state) == checkpoint.digest(twin)


@pytest.mark.parametrize("gone", [False, True], ids=["the first lives", "the first is gone"])
def test_a_new_state_trains_the_parameters_that_were_put_into_the_module(gone):
    model = made(chain)
    first = step(TrainState.create(model, SGD), batches()[0])
    kept = {n: p.detach().clone() for n, p in first.params.items()}
    if gone:
        del first
    loads_by_assignment(model)
    expected = {n: p.detach().clone() for n, p in model.named_parameters()}
    state = TrainState.create(model, SGD)
    assert first_difference({n: p.detach() for n, p in state.params.items()}, expected) is None
    twin = step(create(chain, other=True), batches()[1])
    state = step(state, batches()[1])
    assert first_difference(dict(state.params), dict(twin.params)) is None
    assert all(p is state.params[n] for n, p in state.model.named_parameters())
    if not gone:
        assert first_difference({n: p.detach() for n, p in first.params.items()}, kept) is None


def test_the_refusal_says_what_to_do_and_lists_a_few_names():
    model = made(chain)
    state = TrainState.create(model, SGD)
    for number in range(3, 7):
        model.append(nn.Linear(2, 2, bias=number % 2 == 0))
    with pytest.raises(ConfigError) as caught:
        step(state, batches()[0])
    assert str(caught.value) == (
        "The model was changed behind the state: it has new layers, parameters or buffers: 3.weight, 4.weight, 4.bias, 5.weight, "
        "6.weight. A state trains the tensors that it was made with. Give a state other values with state.with_params(...); "
        "after a change of the model itself, make a new state with TrainState.create(model, ...)."
    )
    del model[:]
    with pytest.raises(ConfigError) as caught:
        step(state, batches()[0])
    assert (
        "layers, parameters or buffers were removed: 0.weight, 0.bias, 1.weight, 1.bias, 1.running_mean. A state"
        in str(caught.value)
    )


def test_a_new_state_of_the_changed_module_trains_it():
    model = made(chain)
    state = step(TrainState.create(model, SGD), batches()[0])
    gives_a_head(state.model)
    model[0].requires_grad_(requires_grad=False)
    fresh = step(TrainState.create(model, SGD), batches()[1])
    assert fresh.model[2].weight is fresh.params["2.weight"]
    assert list(fresh.slots) == ["1.weight", "1.bias", "2.weight", "2.bias"]


# -- objectives that reach other tensors ------------------------------------------------------------------------------


def gradients(state, objective, *, accumulated):
    if accumulated:
        return accumulate(state, batches(2), objective)
    return backward_scaled(forward_loss(state, batches()[0], objective))


NO_GRADIENT = (
    "No parameter of the state got a gradient: the loss depends on other tensors than the state's. Let the objective compute "
    "with the model that it is given, objective(model, batch), and with no other copy of it."
)


@pytest.mark.parametrize("accumulated", [False, True])
def test_a_loss_of_another_model_is_an_error_and_no_step(accumulated):
    other = made(chain, other=True)
    state = create(chain)

    def elsewhere(_, batch):
        return square(other, batch)

    with pytest.raises(ObjectiveError) as caught:
        gradients(state, elsewhere, accumulated=accumulated)
    assert str(caught.value) == NO_GRADIENT
    assert all(p.grad is None for p in state.params.values())
    assert step(state, batches()[0]).step == 1


@pytest.mark.parametrize("accumulated", [False, True])
@pytest.mark.parametrize("part", [0, 1])
def test_an_objective_that_calls_backward_itself_is_refused_and_leaves_no_gradient(accumulated, part):
    seen = []

    def inner(model, batch):
        seen.append(1)
        if len(seen) == part + 1:
            F.softplus(model(batch)).mean().backward()
        return square(model, batch)

    if part and not accumulated:
        return
    state = create(chain)
    with pytest.raises(ObjectiveError) as caught:
        gradients(state, inner, accumulated=accumulated)
    assert str(caught.value) == (
        "The objective called backward() itself. An objective returns the loss; backward_scaled computes the gradients. For "
        "gradients inside of an objective, use torch.autograd.grad(..., create_graph=True)."
    )
    assert all(p.grad is None for p in state.params.values())
