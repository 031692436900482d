"""A stop flag for several ranks: a signal to one of them stops all of them, after the same step."""

from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from steploop.core.interruption import Interrupted
from steploop.core.ranks import Ranks
from steploop.runs.signals import StopFlag

__all__ = ["AgreedStop"]


class AgreedStop(StopFlag):
    """Says that the run was asked to stop once all ranks have heard of it.

    Between two steps each rank asks all others whether one was told to stop, and reads the answer to what it asked a step
    before: nobody waits, and all read the same answer after the same step.

    Args:
        ranks: who agrees, in a group of their own.
        before: the flag that signals have set so far.
        check_peers: raises if another rank has failed.
    """

    def __init__(self, ranks: Ranks, before: StopFlag, check_peers: Callable[[], None]) -> None:
        super().__init__(at_once=before.at_once, second_raises=before.second_raises)
        self.ends_at = (
            before.ends_at + 1
        )  # a Ctrl-C reaches a rank twice: from the terminal, and from torchrun
        self._heard = before.heard
        self._ranks = ranks
        self._check_peers = check_peers
        self._asked: tuple[Tensor, Any] | None = None

    @property
    def heard(self) -> int | None:
        """The first signal that came to this rank, or None."""
        return self._heard

    def handle(self, signum: int, _: FrameType | None = None) -> None:
        """Note a signal; the others are asked to stop too, after the next step."""
        first = self._heard is None
        if first:
            self._heard = signum
        self.raise_at_once(signum, first=first)

    def check(self) -> None:
        """Only look whether the others are there: a rank that stops alone would leave them waiting."""
        self._check_peers()

    def check_together(self) -> None:
        """Raise Interrupted on all ranks if one was told to stop and this is a moment for it."""
        self.agree()
        if self.interruptible and self.signum is not None:
            raise Interrupted(self.signum)

    def agree(self) -> None:
        """Read what was asked before, and ask again; every rank calls it equally often."""
        if self.signum is not None:
            return
        from torch import distributed

        if self._asked is not None:
            told, work = self._asked
            work.wait()
            if signum := int(told):
                self.signum, self._asked = signum, None
                return
        told = torch.tensor(self._heard or 0)
        work = distributed.all_reduce(
            told, op=distributed.ReduceOp.MAX, group=self._ranks.group, async_op=True
        )
        self._asked = told, work
