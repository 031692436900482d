"""Time the training of a run; pause during evaluations and checkpoints."""

import time
from collections.abc import Callable
from typing import Any

from steploop.core.batch_parts import Parts
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
        """Start or continue the timing."""
        self._since_s = self._clock()

    def stand(self) -> bool:
        """Pause the timing; return whether it was running."""
        if self._since_s is None:
            return False
        self._ran_s += self._clock() - self._since_s
        self._since_s = None
        return True

    def waited(self, seconds: float) -> None:
        """Add seconds that were spent waiting for a batch."""
        self._waited_s += seconds

    def trained(self, batch: Any) -> None:
        """Count a step on ``batch``."""
        if type(batch) is Parts:  # what this rank sees of it, for all ranks
            own = sum(count_samples(part) or 0 for part in batch.batches)
            self._samples += own * batch.total // len(batch.batches)
            return
        self._samples += count_samples(batch) or 0

    def read(self) -> dict[str, float]:
        """Return the numbers for a line of the log, and begin anew."""
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
        """Seconds since the run began, everything included."""
        return self._clock() - self._begun_s
