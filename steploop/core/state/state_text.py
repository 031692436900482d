"""A state in words: a line for a log, rows for a notebook; its tensors are never among them."""

from typing import Any

from torch import Tensor

__all__ = ["state_line", "state_rows"]

_NUMBERS = {int, float, Tensor}  # and no tensor of a trace


def state_line(state: Any) -> str:
    """What ``repr(state)`` gives."""
    spent = "" if state.alive else " (spent)"
    loss = f", loss={float(state.loss):.4g}" if type(state.loss) is Tensor else ""
    rate = _rate(state)
    lr = f", lr={float(rate):.4g}" if type(rate) in _NUMBERS else ""
    return (
        f"TrainState(step={state.applied_steps}, attempted={state.attempted_steps}, epoch={state.epoch}, batch={state.batch}"
        f"{loss}{lr}, precision={state.precision!r}, {_model(state)} on {state.device}){spent}"
    )


def state_rows(state: Any) -> dict[str, str | None]:
    """What a notebook shows: name -> text, or None for a row that is left out."""
    numbers = {"loss": state.loss, "gradient norm": state.grad_norm, "learning rate": _rate(state)}
    return {
        "steps": f"{state.applied_steps}, {state.attempted_steps} attempted",
        "place": f"epoch {state.epoch}, batch {state.batch}",  # counted from 0, as in the state
        **{name: f"{float(n):.4g}" for name, n in numbers.items() if type(n) in _NUMBERS},
        "model": _model(state),
        "precision": f"{state.precision} on {state.device}",
        "spent": None if state.alive else "a later state owns the tensors",
    }


def _rate(state: Any) -> Any:
    return state.hyper[0].get("lr") if state.hyper else None


def _model(state: Any) -> str:
    count = sum(p.numel() for p in state.tensors.params.values())
    return f"{type(state.machine.model).__name__} of {count:,} parameters"
