"""Iterate over the batches of an epoch from any position; move them to a device ahead of use."""

import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from steploop.core.trees import map_tensors, to_device
from steploop.errors import ConfigError, DataError

__all__ = ["EpochBatches", "ahead_of_use", "as_device", "grouped"]

_END = object()


def as_device(device: torch.device | str | None) -> torch.device | None:
    """Convert the name of a device; None stays None.

    Raises:
        ConfigError: there is no such device.
    """
    try:
        return None if device is None else torch.device(device)
    except RuntimeError as error:
        raise ConfigError(
            f"device must be a torch device such as 'cpu' or 'cuda:0', got {device!r}"
        ) from error


class EpochBatches(Iterator[Any]):
    """What ``loader.epoch(epoch, start)`` gives.

    Attributes:
        position: batches of the epoch that lie behind: ``start`` and those handed out since. Continuing at
            ``loader.epoch(epoch, position)`` gives what this iterator would have given next.
        waited_s: seconds spent in here so far, waiting for the batches or making them; divided by the wall
            time of the loop, the share of it that the data cost.

    Example:
        >>> batches = Loader(torch.arange(6), batch_size=2, seed=0, shuffle=False).epoch(0, start=1)
        >>> next(batches), batches.position
        (tensor([2, 3]), 2)
    """

    def __init__(self, batches: Iterator[Any], close: Callable[[], None], *, start: int) -> None:
        self._batches = batches
        self._close = close
        self.position = start
        self.waited_s = 0.0
        self._broken: BaseException | None = None

    def __next__(self) -> Any:
        if self._broken is not None:  # a generator that raised would now say that the epoch is over
            raise DataError(
                f"this epoch broke off before batch {self.position} with {type(self._broken).__name__}; "
                f"to go on, call epoch(..., start={self.position})"
            ) from self._broken
        begun = time.perf_counter()
        try:
            batch = next(self._batches)
        except StopIteration:
            self.close()
            raise
        except BaseException as error:
            self._broken = error
            self.close()
            raise
        finally:
            self.waited_s += time.perf_counter() - begun
        self.position += 1
        return batch

    def close(self) -> None:
        """Give up the rest of the epoch; needless after its last batch. Workers end, or wait for the next epoch."""
        close, self._close = self._close, _nothing
        close()

    def __del__(self) -> None:
        self.close()


def _nothing() -> None:
    pass


def grouped(values: Iterator[Any], size: int) -> Iterator[tuple[Any, ...]]:
    """Group the values by so many."""
    while group := tuple(islice(values, size)):
        yield group


def ahead_of_use(
    batches: Iterator[Any], device: torch.device, finish: Callable[[Any, int], Any], depth: int
) -> Iterator[Any]:
    """Move batches to the device, ``depth`` of them ahead where the device works on its own.

    On CUDA the transfers, and ``finish`` with them, run on a stream of their own, while the device is still busy
    with the steps before. A step's own stream waits for the transfer of its batch, the host for nothing.

    Args:
        batches: batches on the host; pinned memory lets their transfer overlap.
        device: where they go.
        finish: ``(batch, n) -> batch``, applied on the device to the n-th.
        depth: transfers in flight at a time.
    """
    if device.type != "cuda":
        for n, batch in enumerate(batches):
            yield finish(to_device(batch, device, non_blocking=False), n)
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch has no types for it
    stream.wait_stream(torch.cuda.current_stream(device))
    flying: list[tuple[Any, torch.cuda.Event]] = []

    def take_off(n: int) -> bool:
        with torch.cuda.stream(stream):  # data that lie on the device are gathered on it, too
            host = next(batches, _END)
            if host is _END:
                return False
            flying.append((finish(to_device(host, device), n), stream.record_event()))
        return True

    n = 0
    while n < depth and take_off(n):
        n += 1
    while flying:
        batch, arrived = flying.pop(0)
        torch.cuda.current_stream(device).wait_event(arrived)
        map_tensors(_used_on_current_stream, batch)
        if take_off(n):
            n += 1
        yield batch


def _used_on_current_stream(tensor: Tensor) -> Tensor:
    """Tell the allocator which stream reads the tensor, so that its memory is not given away too early."""
    if tensor.is_cuda:
        tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return tensor
