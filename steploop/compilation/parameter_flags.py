"""What hangs on a state's parameters, and is built into a graph: whether they are trained, and their hooks."""

import copy
from collections.abc import Sequence
from typing import Any

from steploop.core.state.train_state import TrainState

__all__ = ["flags_of", "same_flags"]


def same_flags(state: TrainState, known: Sequence[Any]) -> bool:
    """Whether what hangs on the parameters is as it was."""
    params = state.tensors.params.values()
    trained, hooks, post, usual = known
    if usual:
        for p in params:
            if (
                not p.requires_grad
                or p._backward_hooks is not None
                or p._post_accumulate_grad_hooks is not None
            ):
                break
        else:
            return True
    return bool(
        [p.requires_grad for p in params] == trained
        and [p._backward_hooks or None for p in params] == hooks
        and [p._post_accumulate_grad_hooks or None for p in params] == post
    )


def flags_of(state: TrainState) -> list[Any]:
    """What hangs on the parameters: whether they are trained, and their hooks; whether all are and there is no hook."""
    params = state.tensors.params.values()
    trained = [p.requires_grad for p in params]
    hooks = [copy.copy(p._backward_hooks) or None for p in params]
    post = [copy.copy(p._post_accumulate_grad_hooks) or None for p in params]
    return [trained, hooks, post, all(trained) and not any(hooks) and not any(post)]
