"""The ranks of a run as one: what rank 0 does for all, what all have to agree on, and how a failure ends all of them."""

import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import attrs

from steploop.core.interruption import Interrupted
from steploop.core.ranks import Ranks
from steploop.errors import ConfigError, DataError, RankFailedError, SteploopError
from steploop.runs.directory import RunDirectory
from steploop.runs.directory_reader import read_record
from steploop.runs.ranks.agreed_stop import AgreedStop
from steploop.runs.ranks.launcher import attempt, launch_id, several_ranks, under_torchrun
from steploop.runs.ranks.peer_watch import Failure, PeerWatch, Process
from steploop.runs.signals import StopFlag, exit_code_of

__all__ = ["Team", "assembled", "shared_directory"]

T = TypeVar("T")
_LOST = re.compile(r"gloo|nccl|connection (closed|reset)|peer|store|socket|broken pipe", re.IGNORECASE)
_LATE = re.compile(r"timed? ?out|timeout", re.IGNORECASE)
_FOR_A_LOST_PEER_S = 10.0  # until its end is seen, once a connection to it has broken
_FOR_A_SIGNAL_S = 2.0  # torchrun sends SIGTERM to the others when one rank has died
_TO_BE_HEARD_S = 1.5  # until the others have looked
_teams = 0  # of this process so far


@attrs.frozen(kw_only=True)
class Team:
    """The processes of a run; most runs have one, for which all of this is nothing.

    Attributes:
        ranks: this rank among the others.
        control: the same, in a group of their own for what they agree on.
        watch: the watch of the other ranks; None for one process.
        limit_s: how long a rank waits for the others.
        launch: what the runs of one launch by torchrun have in common, on rank 0.
    """

    ranks: Ranks = attrs.field(factory=Ranks)
    control: Ranks = attrs.field(factory=Ranks)
    watch: PeerWatch | None = None
    limit_s: float = 600.0
    launch: str | None = None

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which owns the run directory and speaks."""
        return self.ranks.rank == 0

    @property
    def several(self) -> bool:
        """Whether there are other ranks."""
        return self.ranks.size > 1

    def by_first(self, function: Callable[[], T]) -> T:
        """What ``function`` gives on rank 0, on all ranks; something that can be pickled."""
        return self.control.broadcast_object(function() if self.first else None)  # type: ignore[no-any-return]

    def wait_for_all(self) -> None:
        """Return once all ranks are here."""
        self.control.gather_objects(None)

    def begun_before(self, out: Path | None, name: str) -> Path | None:
        """The run of an attempt before this one, if it was begun: torchrun has started the ranks again (--max-restarts).

        Args:
            out: the directory that was named, or None.
            name: of the recipe.
        """
        # on each machine torchrun counts its own restarts
        if not self.several or not any(self.control.gather_objects(attempt())):
            return None

        def found() -> str | None:
            for path in [out] if out is not None else sorted(Path("runs").glob(f"{name}-*")):
                with suppress(DataError):
                    if ((read_record(path, "config.json") or {}).get("launched_by")) == self.launch:
                        return str(path)
            return None

        path = self.by_first(found)
        return None if path is None else Path(path)

    def require_same(self, **values: Any) -> None:
        """Refuse to train where the ranks do not have the same of something.

        Args:
            values: what to call it (with underscores for spaces) -> a JSON value.

        Raises:
            ConfigError: names the ranks and what differs.
        """
        if not self.several:
            return
        texts = {name: json.dumps(value, sort_keys=True, default=str) for name, value in values.items()}
        digests = {name: sha256(text.encode()).hexdigest() for name, text in texts.items()}
        for rank, other in enumerate(self.control.gather_objects(digests)):
            if names := [name.replace("_", " ") for name in digests if other[name] != digests[name]]:
                raise ConfigError(
                    f"rank {self.ranks.rank} and rank {rank} have not the same {' and '.join(names)}. All ranks have to build the "
                    "same recipe from the same data: look for what depends on the machine, the time, or random numbers "
                    "without a seed."
                )

    def stop_flag(self, before: StopFlag) -> StopFlag:
        """The flag on which all ranks agree; the one that is there if this is the only process."""
        return AgreedStop(self.control, before, self.check) if self.several else before

    def check(self) -> None:
        """Raise RankFailedError if another rank has failed."""
        if self.watch is not None and (failure := self.watch.failure) is not None:
            raise self._consequence(failure)

    def at(self, step: int) -> None:
        """Note how far this rank is, for the others to tell who hangs."""
        if self.watch is not None:
            self.watch.steps = step

    def failed(self, error: BaseException) -> BaseException:
        """The error that ends this rank: its own, told to the others, or that of the rank that failed first."""
        watch = self.watch
        if watch is None or isinstance(error, RankFailedError):
            return error
        text = _whole(error)
        if isinstance(error, Interrupted):
            failure = watch.await_failure(_FOR_A_SIGNAL_S if under_torchrun() else 0.0)
        elif isinstance(error, SteploopError):
            failure = watch.failure
        elif _LATE.search(text) and (hung := self._hung(watch)) is not None:
            failure = watch.report(hung)
        else:
            failure = watch.await_failure(_FOR_A_LOST_PEER_S if _LOST.search(text) else 0.0)
        if failure is None:
            failure = watch.report(
                Failure(
                    self.ranks.rank, self.ranks.rank, f"rank {self.ranks.rank}: {_said(error)}", _code(error)
                )
            )
        return error if failure.rank == failure.by == self.ranks.rank else self._consequence(failure)

    def _consequence(self, failure: Failure) -> RankFailedError:
        said = failure.by != self.ranks.rank
        if self.watch is not None and not said:
            self.watch.told = True
        return RankFailedError(f"{failure.sentence.removesuffix('.')}.", said=said)

    def _hung(self, watch: PeerWatch) -> Failure | None:
        """The rank that the others wait for in vain; None where it is not known."""
        places = watch.places()
        rank = min(places, key=lambda one: (places[one].waits, places[one].steps, one))
        place = places[rank]
        if place.waits and len({one.steps for one in places.values()}) < 2:
            return None
        return Failure(
            rank,
            self.ranks.rank,
            f"rank {rank} hangs in {place.line}, in step {place.steps}: the others have waited for it for {self.limit_s:g} s "
            "(--rank-timeout)",
        )


def shared_directory(team: Team, make: Callable[[], RunDirectory]) -> RunDirectory:
    """The directory that rank 0 makes, on all ranks.

    Raises:
        ConfigError: a rank does not see it.
    """
    directory = team.by_first(make)
    if not directory.path.is_dir():
        raise ConfigError(
            f"rank {team.ranks.rank} on {socket.gethostname()} does not see the run directory {directory.path} that rank 0 has "
            "made. Give a directory on a disk that all machines share: --out DIR."
        )
    return directory


def _whole(error: BaseException) -> str:
    """The text of an error and of those that have caused it."""
    texts: list[str] = []
    seen: BaseException | None = error
    while seen is not None:
        texts.append(f"{type(seen).__name__}: {seen}")
        seen = seen.__cause__ or seen.__context__
    return "\n".join(texts)


def _said(error: BaseException) -> str:
    if isinstance(error, Interrupted):
        return "interrupted before the first step; there was nothing to save"
    if isinstance(error, SteploopError):
        return str(error)
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def _code(error: BaseException) -> int:
    if isinstance(error, Interrupted):
        return exit_code_of(error.signum)
    return error.exit_code if isinstance(error, SteploopError) else 1


@contextmanager
def assembled(*, exact: bool = True, limit_s: float | None = None) -> Iterator[Team]:
    """Let the ranks of this process find each other; inside, a failure of one ends all.

    Args:
        exact: whether sums over parts do not depend on the number of ranks.
        limit_s: how long a rank waits for the others.

    Raises:
        RankFailedError: another rank failed, died or hangs.
    """
    limit_s = 600.0 if limit_s is None else limit_s
    if not several_ranks():
        yield Team(limit_s=limit_s)
        return
    if not limit_s >= 1:
        raise ConfigError(f"rank_timeout must be a number of seconds >= 1, but is {limit_s!r}.")
    from torch import distributed

    global _teams  # noqa: PLW0603
    _teams += 1
    ranks = Ranks.here(exact=exact, timeout_s=limit_s)
    group = distributed.new_group(backend="gloo", timeout=timedelta(seconds=limit_s))
    control = attrs.evolve(ranks, group=group)
    processes = control.gather_objects(Process.here())
    # of this run and this start of it: torchrun's store may hold what the ranks before said
    name = control.broadcast_object(uuid4().hex)
    watch = PeerWatch(_store(name), ranks.rank, processes)
    team = Team(ranks=ranks, control=control, limit_s=limit_s, watch=watch, launch=launch_id(_teams))
    try:
        yield team
        team.wait_for_all()  # rank 0 may still fail while others are done
    except BaseException as error:
        ours = team.failed(error)
        if team.first and not under_torchrun():
            time.sleep(_TO_BE_HEARD_S)  # the store goes with this rank
        watch.leave()
        if ours is error:
            raise
        raise ours from error
    watch.close()


def _store(name: str) -> Any:
    """The store where the ranks found each other, in a corner of this name."""
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # torch does not list them

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # a connection of our own: the group's may be waiting
    store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=30))
    return PrefixStore(f"steploop/{name}", store)
