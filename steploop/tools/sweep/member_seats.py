"""Train members in threads of one process, exactly one of which runs at a time: each stands still at its steps."""

import os
import sys
import threading
from collections.abc import Callable
from typing import Any, TextIO

from steploop.core.state.train_state import TrainState
from steploop.runs.signals import StopFlag

__all__ = ["Seat", "SharedStop"]

TrainStep = Callable[[Any, Any], Any]


class SharedStop(StopFlag):
    """The flag of one member among several: a signal to the process is one to each of them.

    Args:
        whole: the flag of the process.
    """

    def __init__(self, whole: StopFlag) -> None:
        self._whole = whole
        super().__init__(second_raises=True)

    @property
    def signum(self) -> int | None:
        """The first signal that came to the process."""
        return self._whole.signum

    @signum.setter
    def signum(self, _: int | None) -> None:
        """Only the process is told."""


class Seat:
    """A member that trains in a thread of its own. It runs while ``turn`` lasts, and stands at a step in between.

    Nothing is concurrent: whoever calls ``turn`` waits. What a process has once (standard streams) is the member's own
    during its turn.

    Args:
        number: of the member.
        train: trains it, and gives its exit code.
        log: a descriptor that takes what it prints; it is closed here.

    Attributes:
        code: its exit code; None while it has not ended.
        state: what the step at which it stands is to be taken on.
        batch: likewise.
        own: its train step.
    """

    def __init__(self, number: int, train: "Callable[[Seat], int]", log: int) -> None:
        self.number = number
        self.code: int | None = None
        self.state: Any = None
        self.batch: Any = None
        self.own: TrainStep = _no_step
        self._train = train
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"member {number:03d}")
        self._goes, self._stands = threading.Semaphore(0), threading.Semaphore(0)
        self._answer: Callable[[], TrainState] = self.alone
        self._log = os.fdopen(log, "a", buffering=1, encoding="utf-8", errors="backslashreplace")
        self._streams: tuple[TextIO, TextIO] = (self._log, self._log)

    # -- called by the member, in its thread ---------------------------------------------------------------------------

    def step(self, state: TrainState, batch: Any) -> TrainState:
        """Stand still until the step is taken; the first one, which makes the optimizer's slots, is the member's own."""
        if state.attempted_steps == 0:
            return self.own(state, batch)  # type: ignore[no-any-return]  # a recipe's
        self.state, self.batch = state, batch
        self._stands.release()
        self._goes.acquire()
        return self._answer()

    def alone(self) -> TrainState:
        """An answer to ``step``: the member's own train step, with its own errors."""
        return self.own(self.state, self.batch)  # type: ignore[no-any-return]  # a recipe's

    def _run(self) -> None:
        self._goes.acquire()
        try:
            self.code = self._train(self)
        except BaseException:  # noqa: BLE001  (an error that all were given; who gave it raises it)
            self.code = 1
        finally:
            self.state = self.batch = None
            self._stands.release()

    # -- called by who takes the steps ---------------------------------------------------------------------------------

    def turn(self, answer: Callable[[], TrainState] | None = None) -> None:
        """Let the member go on, until it stands at its next step or has ended.

        Args:
            answer: gives the state after the step at which it stands, or raises; called in its thread. None: it begins.
        """
        if answer is None:
            self._thread.start()
        else:
            self._answer = answer
        here = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = self._streams
        self._goes.release()
        try:
            self._stands.acquire()
        except BaseException:  # Ctrl-C: two must not run at once
            self._stands.acquire()
            raise
        finally:
            self._streams = sys.stdout, sys.stderr
            sys.stdout, sys.stderr = here
        if self.code is not None:
            self._thread.join()
            self._log.close()

    @property
    def begun(self) -> bool:
        """Whether it has had a turn, and has not ended."""
        return self.code is None and self._thread.ident is not None


def _no_step(*_: Any) -> Any:
    raise AssertionError("a member has no train step before its recipe is built")
