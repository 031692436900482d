"""Generate optimizers: every dense one of torch, with the options that change its arithmetic."""

import inspect
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

from steploop.core.optimizer import Optimizer

__all__ = ["OPTIMIZERS", "dense_optimizers", "optimizers"]

# Hyperparameters besides the learning rate, by name: an optimizer gets those that its constructor knows.
_OPTIONS: dict[str, tuple[Any, ...]] = {
    "weight_decay": (0.0, 0.1),
    "momentum": (0.0, 0.9),
    "amsgrad": (False, True),
    "maximize": (False, True),
    "centered": (False, True),
    "betas": ((0.9, 0.999), (0.5, 0.9)),
    "decoupled_weight_decay": (False, True),
    "foreach": (None, False),
}


def dense_optimizers() -> list[type[torch.optim.Optimizer]]:
    """List every class of ``torch.optim`` that takes dense gradients, new ones included."""
    found = [
        c for c in vars(torch.optim).values() if inspect.isclass(c) and issubclass(c, torch.optim.Optimizer)
    ]
    return [c for c in found if c not in (torch.optim.Optimizer, torch.optim.SparseAdam)]


OPTIMIZERS = dense_optimizers()


def _takes(torch_class: type[torch.optim.Optimizer], option: str) -> bool:
    return option in inspect.signature(torch_class.__init__).parameters


@st.composite
def optimizers(
    draw: st.DrawFn, model: nn.Module | None = None, kind: type[torch.optim.Optimizer] | None = None
) -> Optimizer:
    """Descriptions of any optimizer that can train ``model``, with any of its options.

    Muon takes matrices only and LBFGS one group only; both are left out where the model or a group does not suit.

    Args:
        draw: given by Hypothesis.
        model: whose parameters it shall train; its first layer is where a parameter group may be.
        kind: this optimizer and no other.
    """
    names = [] if model is None else [name for name, p in model.named_parameters() if p.requires_grad]
    matrices = model is not None and all(p.dim() == 2 for p in model.parameters() if p.requires_grad)
    kinds = [c for c in OPTIMIZERS if c is not torch.optim.Muon or matrices]
    torch_class = kind or draw(st.sampled_from(kinds), label="optimizer")
    options = {
        name: draw(st.sampled_from(choices), label=name)
        for name, choices in _OPTIONS.items()
        if _takes(torch_class, name)
    }
    options["lr"] = draw(st.sampled_from([0.1, 0.01]) | st.floats(1e-4, 0.2), label="lr")
    if torch_class is torch.optim.LBFGS:
        # no line search: torch's divides by zero where a schedule gives a rate of 0
        return Optimizer(torch_class, **options, max_iter=draw(st.integers(1, 3), label="max_iter"))
    if torch_class is torch.optim.SGD and options["momentum"]:
        options["nesterov"] = draw(st.booleans(), label="nesterov")
    if _takes(torch_class, "fused") and options["foreach"] is None:
        options["fused"] = draw(st.sampled_from([None, True]), label="fused")
    groups: list[tuple[str, dict[str, Any]]] = []
    if len(names) > 1 and draw(st.booleans(), label="groups"):
        groups = [
            (names[0], {"lr": options["lr"] * draw(st.sampled_from([0.5, 3.0]), label="lr of the group")})
        ]
    no_decay = bool(len(names) > 1 and options.get("weight_decay") and draw(st.booleans(), label="no_decay"))
    return Optimizer(torch_class, groups=groups, no_decay=[names[-1]] if no_decay else False, **options)
