"""Ranks that are started again find each other, and not those of the start before, in a store that outlives them."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore

from steploop.core.rank_meeting import meet
from steploop.errors import RankFailedError


def start(store, size, late=None, absent=(), timeout_s=30.0):
    """The name that each rank gets, or its error; the rank ``late`` comes after all others have looked."""

    def one(rank):
        time.sleep(0.1 if rank == late else 0.0)
        try:
            return meet(store, rank, size, timeout_s)
        except RankFailedError as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, [rank for rank in range(size) if rank not in absent]))


@pytest.mark.parametrize("late", [0, 1, 2])
def test_every_start_has_one_name_of_its_own(late):
    store = HashStore()
    names = [set(start(store, 3, late)) for _ in range(3)]
    assert [len(name) for name in names] == [1, 1, 1]
    assert len(set.union(*names)) == 3


@pytest.mark.parametrize("absent", [0, 1])
def test_a_start_to_which_a_rank_did_not_come_misleads_no_later_one(absent):
    store = HashStore()
    start(store, 2)
    (error,) = start(store, 2, absent={absent}, timeout_s=0.2)
    assert str(error).startswith(f"rank {1 - absent} has waited 0.2 s for the others of 2 ranks to start.")
    names = start(store, 2, late=absent)
    assert names[0] == names[1]
