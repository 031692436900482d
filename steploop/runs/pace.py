"""How fast a run goes: a watch that runs while batches are folded, and stands while something else is done."""

import time
from collections.abc import Callable
from typing import Any

from steploop.core.trees import count_samples

__all__ = ["Pace"]


class Pace:
    """Samples per second and the share of time spent waiting for data, since the last reading.

    The watch stands until ``go()``. An evaluation, a checkpoint after an epoch and the start of workers for the next one
    are no training, and do not count.

    Args:
        begun_s: when the run began, by ``clock``.
        clock: seconds.
    """

    def __init__(self, begun_s: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self._begun_s = begun_s
        self._clock = clock
        self._since_s: float | None = None  # when the watch began to run; None while it stands
        self._ran_s, self._samples, self._waited_s = 0.0, 0, 0.0

    def go(self) -> None:
        """Let the watch run."""
        self._since_s = self._clock()

    def stand(self) -> bool:
        """Stop the watch; whether it ran."""
        if self._since_s is None:
            return False
        self._ran_s += self._clock() - self._since_s
        self._since_s = None
        return True

    def waited(self, seconds: float) -> None:
        """Note that so much of the time went by without a batch to train on."""
        self._waited_s += seconds

    def trained(self, batch: Any) -> None:
        """Note that a step was taken on ``batch``."""
        self._samples += count_samples(batch) or 0

    def read(self) -> dict[str, float]:
        """The numbers for a line of the log; the next ones begin here."""
        if self.stand():
            self.go()
        ran_s = max(self._ran_s, 1e-9)
        values = {
            "samples_per_s": self._samples / ran_s,
            "data_wait": min(self._waited_s / ran_s, 1.0),
            "time_s": self.time_s,
        }
        self._ran_s, self._samples, self._waited_s = 0.0, 0, 0.0
        return values

    @property
    def time_s(self) -> float:
        """Seconds since the run began, whatever was done in them."""
        return self._clock() - self._begun_s
