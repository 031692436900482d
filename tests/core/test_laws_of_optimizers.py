"""Law 16: every optimizer of torch that trains dense parameters is bit-equal to itself in a loop written by hand."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steploop import Optimizer
from steploop.testing import check_optimizer_equals_its_loop, strategies
from steploop.testing.strategies import OPTIMIZERS, Task, classification


class Matrices(torch.nn.Module):
    """What Muon trains: two matrices and nothing else."""

    def __init__(self, task):
        super().__init__()
        self.first = torch.nn.Linear(task.features, task.width, bias=False)
        self.head = torch.nn.Linear(task.width, task.classes, bias=False)
        self.load_state_dict(
            {f"{n}.weight": getattr(task.model(), n).weight.detach() for n in ("first", "head")}
        )

    def forward(self, x):
        return self.head(torch.tanh(self.first(x)))


def models_of(task, torch_class):
    make = Matrices if torch_class is torch.optim.Muon else Task.model
    return make(task), make(task)


@pytest.mark.parametrize("torch_class", OPTIMIZERS, ids=lambda c: c.__name__)
@settings(max_examples=settings.default.max_examples // 3)
@given(
    data=st.data(),
    task=strategies.tasks(dropout=0.0),
    donate=st.booleans(),
    max_norm=st.sampled_from([0.1, 1e9]),
)
def test_every_optimizer_is_itself_in_a_loop_written_by_hand(torch_class, data, task, donate, max_norm):
    model, twin = models_of(task, torch_class)
    optimizer = data.draw(strategies.optimizers(model, kind=torch_class))
    check_optimizer_equals_its_loop(
        optimizer, model, twin, task.batches(3), classification, max_norm=max_norm, donate=donate
    )


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
@pytest.mark.parametrize("donate", [True, False])
def test_an_optimizer_that_evaluates_again_is_itself_with_and_without_a_line_search(line_search, donate):
    """The loop by hand passes a closure that begins with zero_grad() and ends with backward()."""
    task = Task(batch_norm=True, tied=True, frozen=True, unused=True, scalar=True, counter=True)
    optimizer = Optimizer(torch.optim.LBFGS, lr=0.5, max_iter=6, history_size=3, line_search_fn=line_search)
    check_optimizer_equals_its_loop(
        optimizer, task.model(), task.model(), task.batches(4), classification, max_norm=1e9, donate=donate
    )


FUSED = [c for c in OPTIMIZERS if "fused" in inspect.signature(c.__init__).parameters]
AMSGRAD = [c for c in OPTIMIZERS if "amsgrad" in inspect.signature(c.__init__).parameters]


@pytest.mark.parametrize(
    ("torch_class", "options"),
    [(c, {"fused": True}) for c in FUSED]
    + [(c, {"amsgrad": True, "maximize": True}) for c in AMSGRAD]
    + [(c, {"foreach": True}) for c in (torch.optim.SGD, torch.optim.Adam)]
    + [(torch.optim.Adam, {"lr": torch.tensor(0.1)})],
    ids=str,
)
@pytest.mark.parametrize("donate", [True, False])
def test_groups_and_no_decay_rules_are_torchs_too(torch_class, options, donate):
    task = Task(batch_norm=True, tied=True, frozen=True, unused=True, scalar=True)
    optimizer = Optimizer(
        torch_class, no_decay=True, groups=[("head.*", {"lr": 0.01}), ("first.weight", {"weight_decay": 0.5})],
        **({"lr": 0.1, "weight_decay": 0.1} | options),
    )  # fmt: skip
    check_optimizer_equals_its_loop(
        optimizer, task.model(), task.model(), task.batches(4), classification, donate=donate
    )


def test_all_of_torchs_optimizers_are_known():
    """A new one in torch is tested as soon as it is there; one that disappears is noticed here."""
    names = {c.__name__ for c in OPTIMIZERS}
    assert names == {
        "ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "LBFGS", "Muon", "NAdam", "RAdam", "RMSprop",
        "Rprop", "SGD",
    }  # fmt: skip


def test_a_step_that_decays_what_it_should_not_fails_the_law():
    """The law is not blind: here the loop by hand has another weight decay."""

    class Forgetful(Optimizer):
        def build(self, params):
            built = Optimizer.build(self, params)
            if "first.weight" in params and not hasattr(Forgetful, "seen"):
                Forgetful.seen = True
                built[0].param_groups[0]["weight_decay"] = 0.5
            return built

    task = Task()
    with pytest.raises(
        AssertionError,
        match=r"after step 0 .*SGD.* must equal itself in a loop written by hand: params\.first",
    ):
        check_optimizer_equals_its_loop(
            Forgetful(torch.optim.SGD, lr=0.1), task.model(), task.model(), task.batches(1), classification
        )
