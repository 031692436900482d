"""A law that fails names what changed: the optimizer's group, or a value that a model or an optimizer keeps for itself."""

import attrs
import pytest
import torch
from torch import nn

from steploop import Optimizer, TrainState, backward_scaled, forward_loss, optimizer_step, unscale_and_clip
from steploop.testing import check_input_stays_whole, check_same_input_same_result, pure, require_same, values
from steploop.testing.hidden_changes import hidden_values, what_changed


class Counting(nn.Linear):
    """Counts its calls where no state sees it: it leaves them out of the extra state that it declares."""

    calls = 0

    def get_extra_state(self):
        return {}

    def set_extra_state(self, state):
        pass

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * self.calls


def step(state, batch):
    state = forward_loss(state, batch, lambda model, x: model(x).square().mean())
    return optimizer_step(unscale_and_clip(backward_scaled(state), max_norm=1.0))


def counting(**options):
    model = nn.Sequential(Counting(2, 2))
    model[0].calls = 0
    return TrainState.create(model, Optimizer(torch.optim.SGD, lr=0.1, **options))


def test_a_hyperparameter_that_differs_is_named_with_its_group():
    state = counting(groups=[("*.bias", {"lr": 0.2})])
    hyper = (state.hyper[0], {**state.hyper[1], "lr": 0.5})
    with pytest.raises(AssertionError) as failure:
        require_same(attrs.evolve(state, hyper=hyper), state, "nothing changes")
    assert str(failure.value) == "nothing changes: the optimizer's group 1: lr: 0.5 against 0.2"
    with pytest.raises(
        AssertionError, match=r"nothing changes: d\.the optimizer's group 1: lr: 0\.5 against 0\.2"
    ):
        require_same({"d": attrs.evolve(state, hyper=hyper)}, {"d": state}, "nothing changes")


@pytest.mark.parametrize(
    ("check", "before"),
    [
        (lambda s, x: check_input_stays_whole(pure(step), s, x), 1),
        (lambda s, x: check_same_input_same_result(step, s, [x, x]), 2),
    ],
    ids=["input", "result"],
)
def test_a_value_that_a_module_keeps_for_itself_is_named(check, before):
    with pytest.raises(
        AssertionError, match="the same state and batch must give the same result again"
    ) as failure:
        check(counting(), torch.ones(3, 2))
    place = f"What changed is the attribute 0.calls of the model, from {before} to {2 * before}"
    assert str(failure.value).endswith(place)


def test_a_value_that_an_optimizer_keeps_in_a_group_or_as_an_attribute_is_named():
    state = counting()
    before = hidden_values(state)
    optimizer = state.machine.optimizer
    optimizer.param_groups[0]["k"] = 1
    assert what_changed(before, hidden_values(state)) == ""  # a new one is no change
    optimizer.param_groups[0]["nesterov"] = True
    changed = what_changed(before, hidden_values(state))
    assert changed == ". What changed is 'nesterov' of the optimizer's group 0, from False to True"
    optimizer.param_groups[0]["nesterov"], optimizer.turns = False, 3
    before = hidden_values({"a": state})
    optimizer.turns = 4
    changed = what_changed(before, hidden_values({"a": state}))
    assert changed == ". What changed is a: the attribute turns of the optimizer, from 3 to 4"


def jagged(last):
    return torch.nested.nested_tensor([torch.ones(2), torch.full((3,), last)], layout=torch.jagged)


def test_sparse_nested_and_numpy_values_are_compared_by_their_numbers():
    one = {
        "s": torch.eye(3).to_sparse(),
        "n": jagged(1.0),
        "a": None,
    }
    one["a"] = torch.ones(2).numpy()
    other = {
        **one,
        "s": torch.eye(3).to_sparse().transpose(0, 1),
        "a": torch.ones(2).numpy(),
    }
    require_same(one, other, "nothing changes")
    for key, value, where in (
        ("s", (2 * torch.eye(3)).to_sparse(), "s.values: 3 of 3"),
        ("n", jagged(0.0), "n.1: 3 of 3"),
        ("a", torch.zeros(2).numpy(), "a: 2 of 2"),
    ):
        with pytest.raises(AssertionError, match=where):
            require_same(one, {**one, key: value}, "nothing changes")


def test_what_is_saved_in_values_does_not_depend_on_the_naming():
    assert values(counting())["hyper"][0]["lr"] == 0.1


class CountingSGD(torch.optim.SGD):
    """Counts its steps in an attribute of its own, which belongs to the state."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr=lr)
        self.taken = 0

    def step(self, closure=None):
        self.taken += 1
        return super().step(closure)


def test_what_an_optimizer_keeps_of_its_own_is_named():
    state = TrainState.create(nn.Linear(2, 2), Optimizer(CountingSGD))
    with pytest.raises(AssertionError, match=r"nothing changes: the optimizer's own taken: 1 against 0"):
        require_same(
            {**values(state), "beside": values(step(state.clone(), torch.ones(3, 2)))["beside"]},
            values(state),
            "nothing changes",
        )
