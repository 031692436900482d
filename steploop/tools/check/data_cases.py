"""Cases of the laws of the batches: a function of epoch and position, for any number of workers."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from steploop.data.accepted import is_tensors
from steploop.data.loader import Loader
from steploop.testing.order_laws import (
    check_batches_do_not_depend_on_workers,
    check_cursor_continues_the_epoch,
)
from steploop.tools.check.batch_structure import incomparable
from steploop.tools.check.cases import Case, NotApplicable, amount
from steploop.tools.check.subjects import Subject, smaller

__all__ = ["data_order", "workers"]


def data_order(s: Subject) -> Iterator[Case]:
    """An epoch from a cursor on is the rest of the epoch."""
    _require_comparable(s)
    for cut in range(len(s.batches)):
        yield (
            f"epoch 0 from batch {cut} on",
            partial(check_cursor_continues_the_epoch, s.recipe.batches, 0, cut, limit=len(s.batches)),
        )


def workers(s: Subject) -> Iterator[Case]:
    """The same batches in this process, and from one and two workers."""
    batches = s.recipe.batches
    names = [name for name, value in s.settings.items() if "workers" in name and type(value) is int]
    make: Callable[[int], Any]
    if isinstance(batches, Loader):
        if is_tensors(batches.dataset) and batches.transform is None and batches.collate is None:
            raise NotApplicable("the data are tensors, and nothing is done to single samples")
        count = min(s.samples, batches.batch_size)

        def make(number: int) -> Loader:
            return smaller(batches, count * 2, batch_size=count, num_workers=number)

    elif names:

        def make(number: int) -> Any:
            return s.fresh(**dict.fromkeys(names, number)).batches

    else:
        raise NotApplicable("the batches are no Loader, and no setting is named workers")
    _require_comparable(s)
    for number in (1, 2):
        for epoch in (0, 1):
            yield (
                f"epoch {epoch}, {amount(number, 'worker')}",
                partial(
                    check_batches_do_not_depend_on_workers,
                    make,
                    workers=(0, number),
                    epochs=(epoch,),
                    limit=s.steps,
                ),
            )


def _require_comparable(s: Subject) -> None:
    kind = incomparable(s.batches[0])
    if kind is not None:
        raise NotApplicable(f"the batch holds a value of type {kind}, which cannot be compared with another")
