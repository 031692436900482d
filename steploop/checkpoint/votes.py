"""What the ranks of a run tell each other about a checkpoint: messages, errors, and who leads."""

import json
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, Final, NoReturn, TypeVar

import torch
from torch import Tensor

from steploop import errors
from steploop.core.ranks import Ranks
from steploop.core.state.several import State, members
from steploop.errors import CheckpointWriteError, ConfigError, SteploopError

__all__ = ["Votes", "described", "rebuilt", "told", "votes_of"]

T = TypeVar("T")
_MOST_NAMED: Final = 3


class Votes:
    """Messages between all ranks; of one rank alone they cost nothing.

    Those of all processes go through a group of their own, so that a thread that saves does not meet the sums of a step.

    Args:
        ranks: of a state; None: this process alone.

    Attributes:
        ranks: the ranks, or None.
        rank: of this process.
        size: how many there are.
        group: that tensors go through; None is the default one.
        members: the number of each rank among all processes.
    """

    def __init__(self, ranks: Ranks | None = None) -> None:
        self.ranks = ranks
        alone = ranks or Ranks()
        self.rank, self.size, self.group = alone.rank, alone.size, alone.group
        self.members = list(range(self.size))
        self._control: Any = None
        if self.size > 1:
            self.members = torch.distributed.get_process_group_ranks(self.group)
            # processes that are some of all cannot make a group without the others: they have the one
            self._control = _control_group() if self.group is None else self.group

    @property
    def apart(self) -> bool:
        """Whether messages may be exchanged in a thread while steps are taken."""
        return self.size == 1 or self.group is None

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which makes, seals and renames directories."""
        return self.rank == 0

    def everyone(self, message: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Give a message to every rank, and get those of all in the order of the ranks."""
        if self.size == 1:
            return [dict(message)]
        data = _encoded(message)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        torch.distributed.all_gather(sizes, torch.tensor([len(data)]), group=self._control)
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(data)] = data
        found = [torch.empty_like(padded) for _ in range(self.size)]
        torch.distributed.all_gather(found, padded, group=self._control)
        return [_decoded(one[: int(size)]) for one, size in zip(found, sizes, strict=True)]

    def from_first(self, message: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Give the message of rank 0 to every rank."""
        if self.size == 1:
            return dict(message or {})
        data = _encoded(message or {}) if self.leads else None
        size = torch.tensor([0 if data is None else len(data)])
        torch.distributed.broadcast(size, group_src=0, group=self._control)
        if data is None:
            data = torch.empty(int(size), dtype=torch.uint8)
        torch.distributed.broadcast(data, group_src=0, group=self._control)
        return _decoded(data)

    def agree(
        self, problem: BaseException | None, otherwise: type[SteploopError] = CheckpointWriteError
    ) -> None:
        """Raise on every rank if there is a problem on any; the sentence names the rank.

        Args:
            problem: of this rank.
            otherwise: what becomes of an error that is none of steploop's.
        """
        if self.size == 1:
            if problem is not None:
                raise problem
            return
        found = self.everyone({} if problem is None else described(problem))
        failed = [rank for rank, one in enumerate(found) if one]
        if failed:
            self.fail(failed, found[failed[0]], problem, otherwise)

    def fail(
        self,
        failed: list[int],
        first: Mapping[str, Any],
        problem: BaseException | None,
        otherwise: type[SteploopError],
    ) -> NoReturn:
        """Raise what went wrong on the ranks ``failed``; an interruption of this process stays what it is."""
        if problem is not None and not isinstance(problem, Exception):
            raise problem
        raise rebuilt(failed, first, otherwise) from problem

    def agreed(self, make: Callable[[], T], otherwise: type[SteploopError] = CheckpointWriteError) -> T:
        """What ``make`` gives on this rank, if it fails on none."""
        problem: BaseException | None = None
        try:
            value = make()
        except BaseException as error:  # noqa: BLE001  (the other ranks have to know of any)
            problem = error
        self.agree(problem, otherwise)
        return value

    def same(self, value: str, what: str) -> None:
        """Raise ConfigError unless ``value``, which stands for ``what``, is the same on every rank."""
        found = [one["value"] for one in self.everyone({"value": value})]
        others = [rank for rank, one in enumerate(found) if one != found[0]]
        if others:
            raise ConfigError(
                f"{what} is another on rank {', '.join(map(str, others[:_MOST_NAMED]))} than on rank 0. Every rank has to ask for the "
                "same at the same step of the same run, on a disk that all of them share."
            )


def described(error: BaseException) -> dict[str, Any]:
    """An error as a message."""
    number = getattr(error, "errno", None)
    text = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
    return {"kind": type(error).__name__, "text": text, "errno": number if isinstance(number, int) else None}


def rebuilt(failed: list[int], first: Mapping[str, Any], otherwise: type[SteploopError]) -> SteploopError:
    """The error that the first of the ranks ``failed`` described, in one sentence that names them."""
    more = f" (and on {len(failed) - 1} more)" if len(failed) > 1 else ""
    return _error(first, f"on rank {failed[0]}{more}: ", otherwise)


def told(message: Mapping[str, Any], otherwise: type[SteploopError] = CheckpointWriteError) -> SteploopError:
    """The error that rank 0 raised and described, as it stands."""
    return _error(message, "", otherwise)


def _error(message: Mapping[str, Any], where: str, otherwise: type[SteploopError]) -> SteploopError:
    kind = getattr(errors, message["kind"], None)
    ours = isinstance(kind, type) and issubclass(kind, SteploopError)
    text = (
        message["text"] if ours or message["errno"] is not None else f"{message['kind']}: {message['text']}"
    )
    error: SteploopError = (kind if ours else otherwise)(f"{where}{text}")  # type: ignore[misc]  # a class of ours
    if message["errno"] is not None:
        error.errno = message["errno"]  # type: ignore[attr-defined]  # of CheckpointWriteError
    return error


def votes_of(state: State) -> Votes | None:
    """The votes of the ranks that a state belongs to; None of a state of one process without ranks.

    Raises:
        ConfigError: of several states some have other ranks.
    """
    found = [one.ranks for one in members(state).values()]
    if any(ranks != found[0] for ranks in found[1:]):
        raise ConfigError(
            "checkpoint: of these states some have other ranks. Give the same to each: TrainState.create(..., ranks=ranks)."
        )
    return None if not found or found[0] is None else Votes(found[0])


_made: tuple[Any, Any] | None = None  # the default group, and the one for messages


def _control_group() -> Any:
    """The group for messages on the host; every process makes it at the same moment, its first save or load."""
    global _made  # noqa: PLW0603  (one for a process)
    world = torch.distributed.group.WORLD
    if _made is None or _made[0] is not world:
        _made = world, torch.distributed.new_group(backend="gloo", timeout=_patience(world))
    return _made[1]


def _patience(world: Any) -> timedelta | None:
    """How long the default group waits for a rank; None where it does not say."""
    try:
        found: timedelta = world._get_backend(torch.device("cpu")).options._timeout
    except (AttributeError, RuntimeError):  # private, or a group that has no CPUs
        return None
    return found


def _encoded(message: Mapping[str, Any]) -> Tensor:
    data = bytearray(json.dumps(message).encode())
    return torch.frombuffer(data, dtype=torch.uint8)


def _decoded(data: Tensor) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(data.numpy().tobytes())
    return found
