"""Every class of three packages trains as in its own loop by hand, in every form of a step, or is refused by name."""

import sys
import warnings
from collections import Counter
from functools import reduce
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from third_party import CLASSES, Setup, batches, by_hand, loss_of, model_of, setup_of

from steploop import (
    Optimizer,
    TrainState,
    backward_scaled,
    checkpoint,
    evaluate,
    forward_loss,
    optimizer_step,
    schedule,
    unscale_and_clip,
)
from steploop.errors import SteploopError

FORMS = ("step", "pure", "clone", "resume", "schedule")


def factor(step):
    return 1.0 / (1 + 0.2 * step)


def first_state(setup: Setup):
    groups = []
    if setup.by_shape:
        groups = [
            (lambda _, p: p.dim() > 1, {"use_muon": True}),
            (lambda _, p: p.dim() <= 1, {"use_muon": False}),
        ]
    model = model_of(bias=setup.bias)
    return TrainState.create(model, Optimizer(setup.cls, groups=groups, **setup.arguments))


def step_of(setup: Setup, *, donate=True):
    def gradients(state, batch):
        return unscale_and_clip(backward_scaled(forward_loss(state, batch, loss_of)), max_norm=float("inf"))

    def step(state, batch):
        if setup.closure is None:
            return optimizer_step(gradients(state, batch), donate=donate)
        begun = state if setup.closure == "only" else gradients(state, batch)
        return optimizer_step(begun, donate=donate, closure=lambda s: gradients(s, batch))

    return step


def run(setup: Setup, form: str, data: list):
    """The last state of a form of the run."""
    step = step_of(setup, donate=form != "pure")
    if form in {"step", "pure"}:
        return reduce(step, data, first_state(setup))
    if form == "schedule":
        rate = first_state(setup).learning_rate
        at = lambda state: schedule(state, lambda t: rate * factor(t))  # noqa: E731
        return reduce(lambda s, x: at(step(s, x)), data, at(first_state(setup)))
    half = reduce(step, data[:3], first_state(setup))
    if form == "clone":
        copy = half.clone()
        reduce(step, data[3:], half)
        return reduce(step, data[3:], copy)
    with TemporaryDirectory() as folder:
        checkpoint.save(half, Path(folder) / "half")
        return reduce(step, data[3:], checkpoint.load(Path(folder) / "half", like=first_state(setup)))


def judge_form(setup: Setup, form: str, expected) -> str:
    data = batches()
    try:
        state = run(setup, form, data)
        found = list(state.params.values())
        loss = evaluate(state, data[:1], loss_of)["loss"]
    except SteploopError as error:
        return f"refused: {type(error).__name__}: {error}"
    except Exception as error:  # noqa: BLE001  (an error of the package is no refusal)
        return f"error: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    same = all(torch.equal(a, b) for a, b in zip(found, expected[0], strict=True))
    if not same:
        return "unequal"
    return "equal" if abs(loss - expected[1]) <= 1e-6 else f"evaluated otherwise: {loss} for {expected[1]}"


def judge(name: str) -> dict[str, str]:
    """form -> "equal", "unequal", "refused: ..." or "error: ..."; for one that does not work by hand, what create says."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the packages warn of their own uses of torch
        setup = setup_of(name)
        if setup.reason:
            try:
                step_of(setup)(first_state(setup), batches()[0])
            except SteploopError as error:
                return {"not by hand": f"refused: {type(error).__name__}: {error}"}
            except Exception as error:  # noqa: BLE001  (likewise)
                return {"not by hand": f"error: {type(error).__name__}: {str(error).partition(chr(10))[0]}"}
            return {"not by hand": f"accepted, though by hand: {setup.reason}"}
        verdicts = {}
        for form in FORMS:
            try:
                expected = by_hand(setup, batches(), factor=factor if form == "schedule" else None)
            except Exception as error:  # noqa: BLE001  (a class without a rate cannot be scheduled by hand)
                verdicts[form] = f"not by hand: {type(error).__name__}"
                continue
            verdicts[form] = judge_form(setup, form, expected)
        return verdicts


WRAPPED, OBJECT = "from another optimizer's", "which a state cannot hold"
INNER, CURVATURE = "wraps another optimizer", "differentiates the gradients once more"
CONSTRUCTOR = "refuses this"
# What a state cannot hold, or what no hand-written loop over parameters and gradients can use, and the words for it.
REFUSED = {
    "AdaHessian": CURVATURE,
    "AdaLOMO": CONSTRUCTOR,
    "AdaShift": OBJECT,
    "AdamMini": CONSTRUCTOR,
    "Conda": OBJECT,
    "DeMo": CONSTRUCTOR,
    "DistributedMuon": CONSTRUCTOR,
    "FriendlySAM": INNER,
    "GSAM": CONSTRUCTOR,
    "LOMO": CONSTRUCTOR,
    "LoRARite": OBJECT,
    "LookSAM": INNER,
    "Lookahead": WRAPPED,
    "Magma": WRAPPED,
    "OrthoGrad": WRAPPED,
    "PCGrad": CONSTRUCTOR,
    "SAM": INNER,
    "SPAM": OBJECT,
    "SafeFP16Optimizer": CONSTRUCTOR,
    "ScalableShampoo": OBJECT,
    "ScheduleFreeWrapper": WRAPPED,
    "SophiaH": CURVATURE,
    "TRAC": WRAPPED,
    "WSAM": CONSTRUCTOR,
}


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_equals_its_own_loop_in_every_form_or_is_refused_with_the_reason(name):
    """Six steps: in place, pure, on a clone, resumed, under a schedule; parameters bit for bit, and what evaluation gives."""
    verdicts = judge(name)
    reason = REFUSED.get(name.rpartition(".")[2]) if name.startswith("pytorch_optimizer.") else None
    if reason is None:
        wrong = {form: v for form, v in verdicts.items() if v not in {"equal", "not by hand: KeyError"}}
        assert wrong == {}
        assert verdicts["step"] == "equal"
    else:
        assert [v for v in verdicts.values() if not v.startswith("refused: ") or reason not in v] == []


def test_every_class_that_is_refused_exists():
    assert {f"pytorch_optimizer.{name}" for name in REFUSED} <= set(CLASSES)


if __name__ == "__main__":
    every = {name: judge(name) for name in CLASSES}
    kinds = {
        name: "/".join(sorted({v.split(":")[0] for v in found.values()})) for name, found in every.items()
    }
    lines = [f"{count} {kind}" for kind, count in Counter(kinds.values()).most_common()]
    lines += [f"{name}: {found}" for name, found in every.items() if kinds[name] != "equal"]
    sys.stdout.write("\n".join(lines) + "\n")
