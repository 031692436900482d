"""Watch the other ranks from a thread: who failed, who is gone, who hangs; and end this process if it cannot end itself."""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs

from steploop.errors import RankFailedError
from steploop.runs.ranks.places import Place

__all__ = ["Failure", "PeerWatch", "Process"]

_FAILED, _BEAT, _DONE = "failed", "beat", "done"


@attrs.frozen
class Process:
    """Where a rank runs.

    Attributes:
        machine: its name, and which processes it can see.
        pid: the number of its process there.
    """

    machine: str
    pid: int

    @classmethod
    def here(cls) -> "Process":
        """This process."""
        with suppress(OSError):
            return cls(f"{socket.gethostname()} {Path('/proc/self/ns/pid').readlink()}", os.getpid())
        return cls(socket.gethostname(), os.getpid())

    @property
    def host(self) -> str:
        """The name of its machine."""
        return self.machine.partition(" ")[0]

    def gone(self, here: "Process") -> bool:
        """Whether it has ended; not known of another machine's."""
        if self.machine != here.machine:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        try:  # one that has ended, and that its parent has not asked after yet
            return (
                Path(f"/proc/{self.pid}/stat")
                .read_text(encoding="ascii", errors="replace")
                .rpartition(")")[2]
                .split()[0]
                in "ZX"
            )
        except (OSError, IndexError):
            return False


@attrs.frozen
class Failure:
    """Why a run ends.

    Attributes:
        rank: that failed, died or hangs.
        by: the rank that says it.
        sentence: what it says.
        code: the exit code of the rank that failed.
    """

    rank: int
    by: int
    sentence: str
    code: int = RankFailedError.exit_code


class PeerWatch:
    """Tells the other ranks of a failure, hears of theirs, and says how far each is.

    What is told goes through the store by which the ranks have found each other: under torchrun it belongs to torchrun
    itself, and outlives every rank. The first failure that is told is the one that counts.

    Args:
        store: holds texts by name; asked from this thread and from the main one.
        rank: this one.
        processes: where each rank runs.
        grace_s: how long this process may take to end by itself once a rank has failed.
        beat_s: between two looks.
        silent_s: after so long without a sign, a rank on another machine counts as gone.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        processes: Sequence[Process],
        *,
        grace_s: float = 8.0,
        beat_s: float = 0.5,
        silent_s: float = 30.0,
    ) -> None:
        self._store = store
        self._rank = rank
        self._processes = processes
        self._grace_s, self._beat_s, self._silent_s = grace_s, beat_s, silent_s
        self._here = processes[rank]
        # one rank of each machine asks for signs of life from the others
        self._asks_all = rank == min(
            n for n, one in enumerate(processes) if one.machine == self._here.machine
        )
        self._seen: dict[int, tuple[str, float]] = {}
        self._changed = threading.Condition()
        self._ended = threading.Event()
        self._main = threading.get_ident()
        self.steps = 0  # how many this rank has begun
        self.store_gone = False
        self.failure: Failure | None = None
        self.told = False  # whether this rank is to say what failed, and has
        self._thread = threading.Thread(target=self._run, daemon=True, name="watch of the other ranks")
        self._thread.start()

    def close(self) -> None:
        """Say that this rank ends well, and stop watching."""
        with suppress(Exception):
            self._store.set(f"{_DONE}/{self._rank}", "1")
        self.leave()

    def leave(self) -> None:
        """Stop watching."""
        self._ended.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def report(self, failure: Failure) -> Failure:
        """Tell all ranks what failed; the failure that was told first."""
        with self._changed:
            if self.failure is None:
                try:
                    text = json.dumps(attrs.asdict(failure))
                    told = self._store.compare_set(_FAILED, "", text)
                    self.failure = Failure(**json.loads(told))
                except Exception:  # noqa: BLE001  (the store may be gone with the rank that held it)
                    self.failure = failure
                self._changed.notify_all()
            return self.failure

    def await_failure(self, seconds: float) -> Failure | None:
        """What failed, after waiting so long at most for somebody to know it."""
        with self._changed:
            self._changed.wait_for(lambda: self.failure is not None, seconds)
            return self.failure

    def places(self) -> Mapping[int, Place]:
        """Where each rank is, as far as it has said so."""
        texts = {rank: self._read(f"{_BEAT}/{rank}") for rank in range(len(self._processes))}
        return {rank: Place(**json.loads(text)) for rank, text in texts.items() if text is not None}

    # -- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        beats = 0
        while not self._ended.wait(self._beat_s):
            try:
                place = Place.of_thread(self._main, steps=self.steps, beat=beats)
                self._store.set(f"{_BEAT}/{self._rank}", json.dumps(attrs.asdict(place)))
                if (text := self._read(_FAILED)) is not None:
                    self._heard(Failure(**json.loads(text)))
                elif (lost := self._lost() or self._silent(beats)) is not None:
                    self.report(lost)
            except Exception:  # noqa: BLE001  (whatever becomes of the connection)
                self.store_gone = True
                if (lost := self._lost(said_goodbye=False)) is not None:
                    self._heard(lost)
            beats += 1
            if self.failure is not None:
                self._end_in_time(self.failure)
                return

    def _heard(self, failure: Failure) -> None:
        with self._changed:
            self.failure = self.failure or failure
            self._changed.notify_all()

    def _read(self, name: str) -> str | None:
        return self._store.get(name).decode() if self._store.check([name]) else None

    def _lost(self, *, said_goodbye: bool = True) -> Failure | None:
        """A rank of this machine that ended without a word."""
        for rank, process in enumerate(self._processes):
            if rank == self._rank or not process.gone(self._here):
                continue
            if said_goodbye and (self._read(f"{_DONE}/{rank}") is not None):
                continue
            if said_goodbye and (text := self._read(_FAILED)) is not None:
                return Failure(**json.loads(text))
            return Failure(
                rank,
                self._rank,
                f"rank {rank} (process {process.pid} on {process.host}) ended without a word: it was killed, perhaps "
                "because memory ran out",
            )
        return None

    def _silent(self, beats: int) -> Failure | None:
        """A rank of another machine that has given no sign of life for long; one rank of each machine asks, now and then."""
        if not self._asks_all or beats % 8:
            return None
        now = time.monotonic()
        for rank, process in enumerate(self._processes):
            if process.machine == self._here.machine:
                continue
            sign = self._read(f"{_BEAT}/{rank}") or ""
            before, since = self._seen.get(rank, ("", now))
            if sign != before or rank not in self._seen:
                self._seen[rank] = sign, now
            elif now - since > self._silent_s and self._read(f"{_DONE}/{rank}") is None:
                return Failure(
                    rank,
                    self._rank,
                    f"rank {rank} (process {process.pid} on {process.host}) has given no sign of life for {now - since:.0f} s: "
                    "its machine or the network is gone",
                )
        return None

    def _end_in_time(self, failure: Failure) -> None:
        """Let the process end by itself; end it where it waits for a rank that will not come."""
        if self._ended.wait(self._grace_s):
            return
        own = failure.rank == self._rank and failure.by == self._rank
        if failure.by == self._rank and not own and not self.told:
            sys.stderr.write(f"steploop: {failure.sentence}.\n")
            sys.stderr.flush()
        os._exit(failure.code if own else RankFailedError.exit_code)
