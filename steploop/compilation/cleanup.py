"""Put a module and an optimizer back as they were: tracing lends them fake tensors and other hyperparameters."""

from collections.abc import Iterator
from contextlib import contextmanager

from steploop.core.state.machine import Machine

__all__ = ["restored"]


@contextmanager
def restored(machine: Machine) -> Iterator[None]:
    """Put the machine back on leaving."""
    put_back = machine.keep()
    try:
        yield
    finally:
        put_back()
