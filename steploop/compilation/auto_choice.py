"""Time a train step in two forms, on clones of the state, so that the run is not disturbed."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from steploop.core.state.train_state import TrainState

__all__ = ["cloned", "measure"]

_ROUNDS = 5
_BUDGET_S = 0.3  # for one form in one round: enough for the clock, and nothing beside compiling
_FEWEST, _MOST = 3, 50  # steps of one form in one round


def cloned(state: Any) -> Any:
    """Clone a state, or every state of a mapping."""
    if isinstance(state, TrainState):
        return state.clone()
    return {name: one.clone() for name, one in state.items()}


def measure(
    forms: Mapping[str, Callable[[Any, Any], Any]],
    state: Any,
    batch: Any,
    agree: Callable[[int], int] = int,
) -> dict[str, float]:
    """Time the forms in turns; return the best microseconds per step of each.

    Interference only ever adds time, so the fastest round says most about the form. Ranks ``agree`` on the number of steps.
    """
    states = {name: cloned(state) for name in forms}
    steps = {}
    for name, step in forms.items():
        states[name] = step(states[name], batch)  # the first call binds, and fills caches
        begin = time.perf_counter()
        states[name] = _finished(step(states[name], batch))
        took = time.perf_counter() - begin
        steps[name] = agree(max(_FEWEST, min(_MOST, int(_BUDGET_S / max(took, 1e-6)))))
    best = dict.fromkeys(forms, float("inf"))
    for _ in range(_ROUNDS):
        for name, step in forms.items():
            one = states[name]
            begin = time.perf_counter()
            for _ in range(steps[name]):
                one = step(one, batch)
            states[name] = _finished(one)
            best[name] = min(best[name], (time.perf_counter() - begin) / steps[name])
    return {name: seconds * 1e6 for name, seconds in best.items()}


def _finished(state: Any) -> Any:
    """Wait for the device by reading one number that the last step computed."""
    one = state if isinstance(state, TrainState) else next(iter(state.values()))
    if one.loss is not None:
        one.loss.item()
    return state
