"""Take batches from any function, for data without samples by index."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import attrs
import torch

from steploop.core.batch_parts import split_parts
from steploop.core.ranks import Ranks
from steploop.core.validators import boolean, integer, require_int
from steploop.data.epochs import EpochBatches, ahead_of_use, as_device
from steploop.errors import ConfigError, DataError, EmptyDataError

__all__ = ["Stream"]


def _is_function(_: Any, field: "attrs.Attribute[Any]", value: Any) -> None:
    if not callable(value):
        raise ConfigError(
            f"{field.name} must be a function (epoch, start) -> iterable of batches, got {type(value).__name__}; for "
            "data that can be gone through many times: Stream(lambda epoch, start: data)"
        )


@attrs.frozen(kw_only=True, eq=False)
class Stream:
    """Take batches from a function: for iterable datasets, generators and other loaders.

    It has the shape of a ``Loader``, but promises less: order, random numbers and what lies at a position are the
    function's affair. Resuming in the middle of an epoch is refused unless ``restorable``.

    Args:
        batches: ``(epoch, start) -> iterable of batches``, called once for every epoch.
        length: batches in an epoch. What comes after them is not read, so a stream may be infinite; less is an
            error. None: an epoch is all that comes, and ``len()`` is not known.
        restorable: whether the function honours ``start``, so that the batches from there on are the same as
            those of the whole epoch from there on.
        device: where the batches go; None leaves them where they are.

    Raises:
        ConfigError: an argument is not legal.

    Example:
        >>> stream = Stream(lambda epoch, start: iter(range(start, 3)), length=3, restorable=True)
        >>> list(stream.epoch(0, start=1))
        [1, 2]
    """

    batches: Callable[[int, int], Iterable[Any]] = attrs.field(kw_only=False, validator=_is_function)
    length: int | None = attrs.field(default=None, validator=attrs.validators.optional(integer(at_least=1)))
    restorable: bool = attrs.field(default=False, validator=boolean())
    device: torch.device | None = attrs.field(default=None, converter=as_device)

    def __len__(self) -> int:
        """Batches in an epoch."""
        if self.length is None:
            raise DataError(
                "this Stream has no known length: give it one, Stream(..., length=batches per epoch)"
            )
        return self.length

    def __iter__(self) -> EpochBatches:
        """The batches of epoch 0, every time."""
        return self.epoch(0)

    def epoch(self, epoch: int, start: int = 0, *, poll: Callable[[], None] | None = None) -> EpochBatches:
        """The batches of an epoch from number ``start`` on.

        Args:
            epoch: the epoch's number, from 0.
            start: the first batch; more than 0 needs a stream that is ``restorable``.
            poll: has the place it has in a ``Loader``; called before every batch, as the waiting is not ours.

        Returns:
            An iterator of batches that knows its ``position`` and the seconds it ``waited_s``.

        Raises:
            ConfigError: there is no such position.
            DataError: the position cannot be restored; later, from the iterator: the stream raised, or ended early.
            EmptyDataError: from the iterator: there was not a single batch.
        """
        require_int("epoch", epoch, minimum=0)
        require_int("start", start, minimum=0, maximum=self.length)
        if start > 0 and not self.restorable:
            raise DataError(
                f"cannot continue at batch {start} of epoch {epoch}: this Stream does not say that its function can "
                "begin there. Begin the epoch anew (start=0: batches are repeated), or make the function honour "
                "`start` and say Stream(..., restorable=True)"
            )
        batches = self._checked(epoch, start, poll)
        if self.device is not None:
            batches = ahead_of_use(batches, self.device, lambda batch, _: batch, depth=2)
        return EpochBatches(batches, lambda: None, start=start)

    def in_parts(
        self, ranks: Ranks, epoch: int = 0, start: int = 0, *, poll: Callable[[], None] | None = None
    ) -> EpochBatches:
        """The same batches as ``epoch`` gives, each as the `Parts` of one rank.

        Every rank reads every batch and keeps its own parts of it: the function has to give the same batches on all.

        Args:
            ranks: whose parts.
            epoch: as for ``epoch``; the rest too.
            start: the first batch.
            poll: called before every batch.

        Raises:
            ConfigError: there is no such position.
            DataError: as from ``epoch``; later, from the iterator: a batch cannot be cut.
        """
        whole = self.epoch(epoch, start, poll=poll)
        return EpochBatches((split_parts(batch, ranks) for batch in whole), whole.close, start=start)

    def _checked(self, epoch: int, start: int, poll: Callable[[], None] | None) -> Iterator[Any]:
        position = start
        if position == self.length:
            return
        source = iter(self.batches(epoch, start))
        while position != self.length:
            if poll is not None:
                poll()
            try:
                batch = next(source)
            except StopIteration:
                break
            except DataError:
                raise
            except Exception as error:
                raise DataError(
                    f"the stream raised at batch {position} of epoch {epoch}: {type(error).__name__}: {error}"
                ) from error
            yield batch
            position += 1
        if position == start == 0:
            raise EmptyDataError(
                f"the stream gave no batch in epoch {epoch}; if it is a generator or another iterator, it is spent "
                "after one epoch: make a new one in the function"
            )
        if self.length is not None and position < self.length:
            raise DataError(
                f"the stream ended after {position} batches of epoch {epoch}, and length={self.length} was promised"
            )
