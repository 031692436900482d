"""Where ranks find each other: in a store that an earlier start of them may have left its values in."""

import time
from typing import Any
from uuid import uuid4

from steploop.errors import RankFailedError

__all__ = ["meet"]

_LOOK_S = 0.02


def meet(store: Any, rank: int, size: int, timeout_s: float) -> str:
    """A name that the ranks of this start have in common, and no start before it had.

    torchrun starts ranks again (--max-restarts) with the store of the start before, and its count of restarts differs from
    machine to machine. What the ranks tell each other under this name cannot be taken for what the ones before them said,
    such as addresses at which nobody listens any more.

    Rank 0 writes down who it believes is here, each by a name drawn anew, until all have confirmed one such list.

    Args:
        store: of torch.distributed.
        rank: of this process.
        size: how many there are.
        timeout_s: how long to wait for the others.

    Raises:
        RankFailedError: not all have come in time.
    """
    own = uuid4().hex
    store.set(f"here {rank}", own)
    end = time.monotonic() + timeout_s
    written = ""
    while time.monotonic() < end:
        if rank == 0:
            here = _read(store, [f"here {r}" for r in range(size)])
            if here and written != (now := " ".join(here)):
                store.set("list", written := now)
            if written and all(one == written for one in _read(store, [f"seen {r}" for r in range(1, size)])):
                store.set(f"complete {own}", written)
                return own
        else:
            names = "".join(_read(store, ["list"]))
            if own in names.split() and written != names:
                store.set(f"seen {rank}", written := names)
            if written and _read(store, [f"complete {written.split()[0]}"]) == [written]:
                return written.split()[0]
        time.sleep(_LOOK_S)
    raise RankFailedError(
        f"rank {rank} has waited {timeout_s:g} s for the others of {size} ranks to start. Look at what they say, and whether their "
        "machines reach each other."
    )


def _read(store: Any, names: list[str]) -> list[str]:
    """The values of all these; none where one is missing."""
    if not names or not store.check(names):
        return []
    return [value.decode() for value in store.multi_get(names)]
