"""Make the list of inputs of a compiled graph; most of it is kept for many steps."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

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
        self._values = [(i, index[value.owner], value.read) for i, value in enumerate(plan.values)]
        own = plan.batch_tensors
        # what stands at each position of all inputs: ("batch", i), ("numbers",), a place, a counter or a constant
        self._all: list[tuple[Any, ...]] = [("batch", i) for i in range(own)]
        self._all.append(("numbers",))
        self._all += [("place", index[owner], place) for owner, place in plan.order]
        self._all += [("counter", index[owner], name) for owner, name in plan.counters]
        self._all += [("constant", tensor) for tensor in plan.graph.constants]
        taken = [self._all[i] for i in plan.graph.wiring.inputs]
        self._batch = [part[1] for part in taken if part[0] == "batch"]
        self._whole_batch = len(self._batch) == own
        self._takes_numbers = ("numbers",) in taken
        self._places: list[tuple[int, Place]] = [(part[1], part[2]) for part in taken if part[0] == "place"]
        self._changing = [part for part in taken if part[0] == "counter"]
        self._last = [part[1] for part in taken if part[0] == "constant"]
        self._extends = bool(self._changing or self._last)
        self._passed = [self._all[~where] for where in plan.graph.wiring.given if where < 0]
        self._fixed: list[Tensor] = []

    def bind(self, states: Sequence[TrainState]) -> None:
        """Put the tensors of these states into the list."""
        self._fixed = [self._numbers] if self._takes_numbers else []
        # detached: kernels write into parameters that autograd would guard, and no call needs torch.no_grad around it
        self._fixed += [tensor_at(states[i], place).detach() for i, place in self._places]

    def arguments(self, states: Sequence[TrainState], batch: list[Tensor]) -> list[Tensor]:
        """Return the inputs for one call, in the order of the pruned graph."""
        view = self._view
        if view is None:
            self._write_on_device(states)
        else:
            for position, i, read in self._values:
                view[position] = read(states[i])
        chosen = batch if self._whole_batch else [batch[i] for i in self._batch]
        if not self._extends:
            return chosen + self._fixed
        return [*chosen, *self._fixed, *(self._counter(states, part) for part in self._changing), *self._last]

    def _write_on_device(self, states: Sequence[TrainState]) -> None:
        """Write the numbers without waiting for the device; copy those that are on it."""
        for position, i, read in self._values:
            value = read(states[i])
            if isinstance(value, Tensor):
                self._numbers[position].copy_(value)
                self._written.pop(position, None)
            elif self._written.get(position) != value:
                self._numbers[position].fill_(value)
                self._written[position] = value

    def passed(self, states: Sequence[TrainState], batch: list[Tensor]) -> list[Tensor]:
        """Return the inputs that the graph returns unchanged, in the order of the outputs."""
        return [self._lookup(states, batch, part) for part in self._passed]

    def _lookup(self, states: Sequence[TrainState], batch: list[Tensor], part: tuple[Any, ...]) -> Tensor:
        if part[0] == "batch":
            index: int = part[1]
            return batch[index]
        if part[0] == "place":
            return tensor_at(states[part[1]], part[2]).detach()
        if part[0] == "counter":
            return self._counter(states, part)
        constant: Tensor = part[1]
        return constant

    def _counter(self, states: Sequence[TrainState], part: tuple[Any, ...]) -> Tensor:
        """Return a counter as a tensor, which it already is while on a device."""
        state, name = states[part[1]], part[2]
        if name in {"applied_steps", "nonfinite_steps"}:
            return torch.as_tensor(getattr(state, name), dtype=torch.int64, device=self._device)
        if state.scale is None:
            return torch.zeros((), device=self._device)
        dtype = torch.float32 if name == "scale" else torch.int64
        return torch.as_tensor(getattr(state.scale, name), dtype=dtype, device=self._device)
