"""Optimizers that nobody here wrote, and for each the loop that a person writes by hand for it."""

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from steploop import fold_in

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the packages say of optional parts
    packages = [
        pytest.importorskip(name, reason=f"{name} is missing: pip install 'steploop[test]'")
        for name in ("pytorch_optimizer", "prodigyopt", "schedulefree")
    ]

__all__ = ["CLASSES", "STEPS", "Setup", "batches", "by_hand", "loss_of", "model_of", "setup_of"]

STEPS = 6

SGD = {"base_optimizer": torch.optim.SGD, "lr": 0.05}
# What a class cannot do without, or what lets it do within a few steps what it else does after many.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "AdaShift": {"keep_num": 2},
    "BSAM": {"num_data": 48},
    "FriendlySAM": SGD,
    "LookSAM": {**SGD, "k": 2},
    "Lookahead": {"k": 2},
    "Ranger": {"k": 2},
    "Ranger21": {"num_iterations": 20, "lr": 1e-2},
    "Ranger25": {"lookahead_merge_time": 2},
    "SAM": SGD,
    "SaRA": {"threshold": 0.2, "lr": 1e-2},
}
# Wrappers of an optimizer: here of SGD with momentum, as a class that is made of parameters.
WRAPPERS = ("Lookahead", "Magma", "OrthoGrad", "ScheduleFreeWrapper", "TRAC")
# Those that treat matrices and vectors apart, by a key of their groups.
BY_SHAPE = ("AdaGO", "AdaMuon", "DistributedMuon", "Muon", "MuonClip", "NorMuon")
MATRICES_ONLY = ("SpectralSphere",)


def _wrapping_sgd(cls: Any) -> type[torch.optim.Optimizer]:
    class Wrapping(cls):
        def __init__(self, params: Any, **options: Any) -> None:
            super().__init__(torch.optim.SGD, params=list(params), lr=0.05, momentum=0.9, **options)

    Wrapping.__name__ = f"{cls.__name__}OfSGD"
    return Wrapping


def _classes() -> dict[str, type[torch.optim.Optimizer]]:
    found = {}
    for package in packages:
        for name in dir(package):
            value = getattr(package, name)
            ours = inspect.isclass(value) and not value.__module__.startswith("torch.")
            if ours and issubclass(value, torch.optim.Optimizer):
                found[f"{package.__name__}.{name}"] = _wrapping_sgd(value) if name in WRAPPERS else value
    return found


CLASSES = _classes()


def model_of(*, bias: bool = True) -> nn.Module:
    """A perceptron with matrices and vectors; dropout, so that each pass draws."""
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 8, bias=bias), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 4, bias=bias))


def batches() -> list[Any]:
    generator = torch.Generator().manual_seed(6)
    return [
        (torch.randn(8, 6, generator=generator), torch.randint(4, (8,), generator=generator))
        for _ in range(STEPS)
    ]


def loss_of(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@attrs.frozen
class Setup:
    """How a class is used by hand.

    Attributes:
        cls: the class.
        arguments: what it is made with.
        closure: None: ``backward(); step()``. "only": ``step(closure)`` alone. "after": gradients first, then ``step(closure)``.
        reason: why it cannot be used by hand on parameters and gradients; "" where it can.
        bias: whether the model has vectors.
        by_shape: whether matrices and vectors are groups of their own, told apart by the key ``use_muon``.
    """

    cls: type[torch.optim.Optimizer]
    arguments: dict[str, Any] = attrs.field(factory=dict)
    closure: str | None = None
    reason: str = ""
    bias: bool = True
    by_shape: bool = False

    def groups(self, model: nn.Module) -> list[Any]:
        """What the class is made of by hand."""
        params = list(model.parameters())
        if not self.by_shape:
            return params
        return [
            {"params": [p for p in params if p.dim() > 1], "use_muon": True},
            {"params": [p for p in params if p.dim() <= 1], "use_muon": False},
        ]


def by_hand(
    setup: Setup, data: list[Any], *, factor: Callable[[int], float] | None = None
) -> tuple[list[torch.Tensor], float]:
    """The parameters after all steps, and the loss of the first batch in evaluation."""
    model = model_of(bias=setup.bias)
    optimizer = setup.cls(setup.groups(model), **setup.arguments)
    scheduler = None if factor is None else torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for step, batch in enumerate(data):
        model.train()
        if callable(getattr(optimizer, "train", None)):
            optimizer.train()
        number = 0

        def closure(step: int = step, batch: Any = batch) -> torch.Tensor:
            nonlocal number
            torch.manual_seed(fold_in(0, step, number))
            number += 1
            optimizer.zero_grad()
            with torch.enable_grad():
                loss = loss_of(model, batch)
                loss.backward()
            return loss

        if setup.closure != "only":
            closure()
        torch.manual_seed(fold_in(0, step, number))  # some draw in their step: as the next pass would
        if setup.closure is None:
            optimizer.step()
        else:
            optimizer.step(closure)
        if scheduler is not None:
            scheduler.step()
    params = [p.detach().clone() for p in model.parameters()]
    model.eval()
    if callable(getattr(optimizer, "eval", None)):
        optimizer.eval()
    with torch.no_grad():
        return params, loss_of(model, data[0]).item()


def setup_of(name: str) -> Setup:
    """The way in which a class works by hand, found by trying; a reason where none does."""
    short, reason = name.rpartition(".")[2], ""
    plain = Setup(
        CLASSES[name],
        ARGUMENTS.get(short, {}),
        bias=short not in MATRICES_ONLY,
        by_shape=short in BY_SHAPE,
    )
    for closure in (None, "only", "after"):
        setup = attrs.evolve(plain, closure=closure)
        try:
            params, _ = by_hand(setup, batches())
        except Exception as error:  # noqa: BLE001  (whatever a package raises)
            reason = reason or f"{type(error).__name__}: {error}"
            continue
        before = model_of(bias=setup.bias).parameters()
        moved = any(not torch.equal(a, b) for a, b in zip(params, before, strict=True))
        if moved and all(bool(p.isfinite().all()) for p in params):
            return setup
        reason = reason or "it moves nothing"
    return attrs.evolve(plain, reason=reason)
