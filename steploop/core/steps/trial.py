"""Cut every evaluation short after its first batch, to see what it gives before a run begins."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import attrs

__all__ = ["Trial", "first_batches", "in_trial", "trial_evaluations"]


@attrs.define
class Trial:
    """What the evaluations of a trial used.

    Attributes:
        averaged: for each call of ``evaluate``, whether it used the averaged weights.
    """

    averaged: list[bool] = attrs.field(factory=list)


_trials: list[Trial] = []


def first_batches(batches: Iterable[Any], *, averaged: bool) -> Iterable[Any]:
    """The batches of an evaluation: all of them, or one during a trial, which notes which weights are used."""
    for trial in _trials:
        trial.averaged.append(averaged)
    return islice(batches, 1) if _trials else batches


def in_trial() -> bool:
    """Whether a trial is going on, in which one batch is enough."""
    return bool(_trials)


@contextmanager
def trial_evaluations() -> Iterator[Trial]:
    """Let every ``evaluate``, and every epoch of a ``Loader``, end after one batch inside."""
    trial = Trial()
    _trials.append(trial)
    try:
        yield trial
    finally:
        _trials.remove(trial)
