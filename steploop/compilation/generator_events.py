"""Random numbers of a traced step: where generators are seeded, kept and put back, and what is drawn in between.

A step whose draws come from one seed draws inside of its graph, after the host has seeded. Any other (two passes, two
states, activation checkpointing, ``fork_rng``) has its draws taken out: the host repeats them before the graph runs,
on the generators themselves and in their order, so that the numbers are those of eager.
"""

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Self
from unittest import mock

import attrs
import numpy as np
import torch
from torch import fx

from steploop.core.ambient_generators import generators_of
from steploop.errors import CompileError

__all__ = ["Event", "Events", "TracedGenerators", "mark"]

_GLOBAL_DRAWS = (
    "draws from {name}, and a graph would use the number that came while it was captured at every step. Draw with torch "
    "(torch.rand(()), torch.randint), or draw outside of train_step and give the number with the batch."
)


@attrs.frozen
class Event:
    """Something that happens to the generators.

    Attributes:
        kind: "seed" (value: name of the state, number of the pass), "manual" (value: a seed), "keep" and "restore"
            (value: which keeping).
    """

    kind: str
    value: Any


def mark(number: int) -> None:
    """Stand in a graph at the place of an event."""


class Events:
    """What a trace does to the generators, in order; each is marked in the graph that is being traced."""

    def __init__(self, device: torch.device, names: list[str]) -> None:
        self.all: list[Event] = []
        self._device = device
        self._names = names
        self._kept: list[_Token] = []

    def add(self, kind: str, value: Any) -> None:
        """Note an event."""
        from torch.fx.experimental.proxy_tensor import get_proxy_mode

        mode = get_proxy_mode()
        if mode is None:
            return
        self.all.append(Event(kind, value))
        fx.node.has_side_effect(mark)
        mode.tracer.graph.call_function(mark, (len(self.all) - 1,))

    def keep(self) -> "_Token":
        """Note that the generators' states are kept; a token for them."""
        token = _Token()
        self._kept.append(token)
        self.add("keep", len(self._kept) - 1)
        return token

    def restore(self, token: object) -> None:
        """Note that they are put back."""
        for number, kept in enumerate(self._kept):
            if kept is token:
                return self.add("restore", number)
        raise CompileError(
            "puts a state of the random generators back that was made outside of this step or changed since. Seed with "
            "torch.manual_seed, or leave the generators to forward_loss, which seeds them for every pass."
        )

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note what the traced code does to the global generators, and leave them as they were."""
        generators = generators_of(self._device)
        kept = [g.get_state() for g in generators]
        python, numpy = random.getstate(), np.random.get_state(legacy=False)  # noqa: NPY002  (the global one)
        watched = _Watched(self)
        try:
            with ExitStack() as stack:
                for owner, name, stand_in in (
                    (torch.random, "default_generator", watched),
                    (torch, "default_generator", watched),
                    (torch.cuda, "get_rng_state", lambda *_, **__: self.keep()),
                    (torch.cuda, "set_rng_state", lambda state, *_, **__: self.restore(state)),
                    (torch.cuda, "manual_seed_all", lambda _: None),
                    (torch.cuda, "manual_seed", lambda _: None),
                ):
                    stack.enter_context(mock.patch.object(owner, name, stand_in))
                yield
            if random.getstate() != python:
                raise CompileError(_GLOBAL_DRAWS.format(name="Python's random"))
            if _words(np.random.get_state(legacy=False)) != _words(numpy):  # noqa: NPY002
                raise CompileError(_GLOBAL_DRAWS.format(name="numpy.random"))
        finally:
            for generator, state in zip(generators, kept, strict=True):
                generator.set_state(state)
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def _words(state: Any) -> tuple[Any, ...]:
    return (
        (bytes(state["state"]["key"]), state["state"]["pos"]) if "key" in state["state"] else (repr(state),)
    )


class _Token:
    """What get_rng_state() gives while a step is traced."""


class _Watched:
    """Stands in for torch's default generator while a step is traced."""

    def __init__(self, events: Events) -> None:
        self._events = events

    def get_state(self) -> _Token:
        return self._events.keep()

    def set_state(self, state: object) -> None:
        self._events.restore(state)

    def manual_seed(self, seed: int) -> "_Watched":
        self._events.add("manual", int(seed))
        return self

    def seed(self) -> int:
        raise CompileError(
            "calls torch.seed(), which takes another seed each time. Use torch.manual_seed(number)."
        )

    def initial_seed(self) -> int:
        raise CompileError("reads torch.initial_seed(), which is another one at each step. Use state.seed.")

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")


class TracedGenerators:
    """Stands in for ``SeededGenerators`` in a trace: notes the events of the passes of one state."""

    def __init__(self, events: Events, name: str) -> None:
        self._events = events
        self._name = name

    def __enter__(self) -> Self:
        self._token = self._events.keep()
        return self

    def seed(self, _seed: Any, _attempted: Any, number: int) -> None:
        """Note a seed: (seed, attempted_steps, number of the pass) of this state."""
        self._events.add("seed", (self._name, number))

    def __exit__(self, *_: object) -> None:
        self._events.restore(self._token)
