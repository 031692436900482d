"""Checkpoints that 0.1.0 wrote are loaded and gone on with, to the bit."""

import inspect
import warnings

import pytest
import torch
from golden_files import GOLDEN, KNOWN, exact
from golden_states import KINDS, build, go_on, values_digest

from steploop import checkpoint
from steploop.errors import ConfigError


def loaded(kind):
    if kind == "lbfgs" and "maximize" not in inspect.signature(torch.optim.LBFGS).parameters:
        pytest.skip(
            "this torch's LBFGS lacks a hyperparameter that the checkpoint has: it is refused by name"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", checkpoint.InexactResumeWarning)  # of another machine
        return checkpoint.load(GOLDEN / "checkpoints" / kind, like=build(kind))


def test_every_kind_of_state_has_a_checkpoint():
    assert set(KNOWN["checkpoints"]) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_0_1_0_holds_what_it_held(kind):
    entry, state = KNOWN["checkpoints"][kind], loaded(kind)
    assert values_digest(state) == entry["values"]
    assert checkpoint.digest(state) == entry["digest"]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lbfgs"])
def test_a_checkpoint_of_0_1_0_is_gone_on_with(kind):
    entry = KNOWN["checkpoints"][kind]
    state = go_on(kind, loaded(kind), entry["further_steps"])
    states = state if isinstance(state, dict) else {"": state}
    assert {name: float(s.loss) for name, s in states.items()} == pytest.approx(
        entry["losses_after"], rel=1e-3
    )
    if exact():
        assert values_digest(state) == entry["values_after"]
        assert checkpoint.digest(state) == entry["digest_after"]


def test_lbfgs_went_on_without_evaluating_the_loss_and_needs_a_closure_now():
    """0.1.0 gave it the gradients of before its step at every evaluation: there are no bits to compare with."""
    with pytest.raises(ConfigError, match=r"LBFGS evaluates the loss itself, several times in a step\."):
        go_on("lbfgs", loaded("lbfgs"), 1)
