"""Make the list of inputs of a compiled graph; most of it is kept for many steps."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from steploop.compilation.flattening import flatten
from steploop.compilation.graph_outputs import FRESH
from steploop.compilation.host_numbers import Now
from steploop.compilation.leaves import Place, tensor_at
from steploop.compilation.plans import StepPlan
from steploop.core.state.train_state import TrainState

__all__ = ["Feed"]


class Feed:
    """Makes the inputs of one graph from states and the tensors of a batch.

    Args:
        plan: says which inputs the graph takes.
        names: of the states, in their order.
        device: of the states.
        on_host: whether the host knows every number without waiting.
    """

    def __init__(self, plan: StepPlan, names: Sequence[str], device: torch.device, *, on_host: bool) -> None:
        index = {name: i for i, name in enumerate(names)}
        self._numbers = torch.zeros(plan.size, dtype=torch.float64, device=device)
        self._device = device
        self._view: Any = None
        if on_host:
            numbers: Any = self._numbers.numpy()
            self._view = memoryview(numbers)  # writing through it costs a twentieth of fill_()
        self._written: dict[int, float] = {}
        self._values = list(enumerate(plan.values))
        own = plan.batch_tensors
        # what stands at each position of all inputs, by its kind
        self._all: list[tuple[Any, ...]] = [("batch", i) for i in range(own)]
        self._all.append(("numbers",))
        self._all += [("place", index[owner], place) for owner, place in plan.order]
        self._all += [("counter", index[owner], name) for owner, name in plan.counters]
        self._all += [("result", index[owner], field, which) for owner, field, which in plan.results]
        self._all += [("constant", tensor) for tensor in plan.graph.constants]
        self._all += [("draw", i) for i in range(plan.graph.drawn)]
        taken = [self._all[i] for i in plan.graph.outline.wiring.inputs]
        self._batch = [part[1] for part in taken if part[0] == "batch"]
        self._whole_batch = len(self._batch) == own
        self._takes_numbers = ("numbers",) in taken
        places: list[tuple[int, Place]] = [(part[1], part[2]) for part in taken if part[0] == "place"]
        # a graph's inputs stand in the order of all: those that change come after, or among the places
        self._kept = not any(place[0] in FRESH for _, place in places)
        self._places = places
        self._changing = [part for part in taken if part[0] not in {"batch", "numbers", "place"}]
        self._passed = [self._all[~where] for where in plan.graph.outline.wiring.given if where < 0]
        self._fixed: list[Tensor] = []

    def bind(self, states: Sequence[TrainState]) -> None:
        """Put the tensors of these states into the list."""
        self._fixed = [self._numbers] if self._takes_numbers else []
        # detached: kernels write into parameters that autograd would guard, and no call needs torch.no_grad around it
        self._fixed += [tensor_at(states[i], place).detach() for i, place in self._places]

    def arguments(self, now: Now, batch: list[Tensor], drawn: list[Tensor]) -> list[Tensor]:
        """Return the inputs for one call, in the order of the pruned graph."""
        view = self._view
        if view is None:
            self._write_on_device(now)
        else:
            for position, read in self._values:
                view[position] = read(now)
        if not self._kept:
            self.bind(now.states)
        chosen = batch if self._whole_batch else [batch[i] for i in self._batch]
        if not self._changing:
            return chosen + self._fixed
        return [*chosen, *self._fixed, *(self._lookup(now, batch, drawn, part) for part in self._changing)]

    def written(self) -> list[Tensor]:
        """The tensors of the states among the inputs: those that the graph may write into."""
        return self._fixed[1:] if self._takes_numbers else self._fixed

    def _write_on_device(self, now: Now) -> None:
        """Write the numbers without waiting for the device; copy those that are on it."""
        for position, read in self._values:
            value = read(now)
            if isinstance(value, Tensor):
                self._numbers[position].copy_(value)
                self._written.pop(position, None)
            elif self._written.get(position) != value:
                self._numbers[position].fill_(value)
                self._written[position] = value

    def passed(self, now: Now, batch: list[Tensor], drawn: list[Tensor]) -> list[Tensor]:
        """Return the inputs that the graph returns unchanged, in the order of the outputs."""
        return [self._lookup(now, batch, drawn, part) for part in self._passed]

    def _lookup(self, now: Now, batch: list[Tensor], drawn: list[Tensor], part: tuple[Any, ...]) -> Tensor:
        kind = part[0]
        if kind == "batch":
            return batch[int(part[1])]
        if kind == "place":
            return tensor_at(now.states[part[1]], part[2]).detach()
        if kind == "counter":
            return self._counter(now.states, part)
        if kind == "result":
            tensors: list[Tensor] = flatten(getattr(now.states[part[1]].flight, part[2]))[0]
            return tensors[int(part[3])]
        if kind == "numbers":
            return self._numbers.clone()
        found: Tensor = drawn[part[1]] if kind == "draw" else part[1]
        return found

    def _counter(self, states: Sequence[TrainState], part: tuple[Any, ...]) -> Tensor:
        """Return a counter as a tensor, which it already is while on a device."""
        state, name = states[part[1]], part[2]
        if name in {"applied_steps", "nonfinite_steps"}:
            return torch.as_tensor(getattr(state, name), dtype=torch.int64, device=self._device)
        if state.scale is None:
            return torch.zeros((), device=self._device)
        dtype = torch.float32 if name == "scale" else torch.int64
        return torch.as_tensor(getattr(state.scale, name), dtype=dtype, device=self._device)
