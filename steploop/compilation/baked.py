"""Guard what a graph has built in: plain values that Python read besides state and batch."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from steploop.compilation.cpu_libraries import libraries
from steploop.compilation.mapping_watch import MISSING, Cells, MappingWatch, Snapshot, same
from steploop.compilation.reach import in_reach
from steploop.core.trees import named_leaves
from steploop.errors import CompileError

__all__ = ["Baked"]


class Baked:
    """The plain values in reach of a train step and the models of its states, as they are now.

    Args:
        train_step: the function.
        models: of the states.
    """

    def __init__(self, train_step: Callable[..., Any], models: Sequence[nn.Module]) -> None:
        self._libraries = libraries()
        self._found = in_reach(train_step, models)
        if self._found.iterators:  # before a trace moves it on
            raise CompileError(
                f"reads the iterator {self._found.iterators[0]}, of which a graph would use one value at every step. Take the values "
                "outside of train_step, and give each with its batch."
            )
        self._places = self._found.values
        self._hooks = [
            h for m in models for one in m.modules() for h in (one._forward_hooks, one._forward_pre_hooks)
        ]
        self._hook_count = sum(map(len, self._hooks))
        self._flatten()
        self._left: list[tuple[MappingWatch, Any]] = []

    def unchanged(self) -> bool:
        """Whether all of them are as they were: 25 ns for each, where they are the same objects."""
        if libraries() != self._libraries:
            return False
        if any(self._hooks) and sum(map(len, self._hooks)) != self._hook_count:
            return False
        try:
            for where, key, value in self._values:
                if where[key] is not value:
                    return self._equal()
            for cell, value in self._cells:
                if cell.cell_contents is not value:
                    return self._equal()
        except (LookupError, ValueError):  # it is gone; the cell is empty
            return False
        return self._as_large()

    def _equal(self) -> bool:
        """Whether they are equal to the bit; then these objects are the ones to compare with."""
        for i, (where, key, value) in enumerate(self._values):
            now = where[key]
            if not same(now, value):
                return False
            self._values[i] = where, key, now
        for i, (cell, value) in enumerate(self._cells):
            if not same(cell.cell_contents, value):
                return False
            self._cells[i] = cell, cell.cell_contents
        return self._as_large()

    def _as_large(self) -> bool:
        """Whether containers hold as many values as they did, and the sets the same ones."""
        if self._wholes and list(map(len, self._wholes)) != self._sizes:
            return False
        return all(same(place[key], value) for place, key, value in self._snapshots)

    def _flatten(self) -> None:
        known = [
            (p.where, k, v)
            for p in self._places
            for k, v in zip(p.keys, p.known, strict=True)
            if v is not MISSING
        ]
        self._values = [one for one in known if not isinstance(one[0], (Cells, Snapshot))]
        self._snapshots = [one for one in known if isinstance(one[0], Snapshot)]
        self._cells = [(where.cells[name], value) for where, name, value in known if isinstance(where, Cells)]
        self._wholes = [p.where for p in self._places if p.whole]
        self._sizes = [p.size for p in self._places if p.whole]

    def changed(self) -> list[str]:
        """The names of those that are not."""
        others = ["the hooks of a module"] if sum(map(len, self._hooks)) != self._hook_count else []
        if libraries() != self._libraries:
            others.append("torch.backends.mkldnn or nnpack")
        return others + [place.name(key) for place in self._places for key, _ in place.changes()]

    # -- what a trace did ------------------------------------------------------------------------------------------

    def tensors_left(self) -> list[tuple[Any, Any, Any]]:
        """The tensors that a traced step has left in attributes: (mapping, key, value); it leaves them at every step."""
        found = []
        for place in (*self._places, *self._found.by_use):
            for key, _ in place.changes():
                value = place.value(key)
                leaves = [leaf for _, leaf in named_leaves(value)]
                if not isinstance(place.where, (list, deque)) and any(
                    isinstance(leaf, Tensor) for leaf in leaves
                ):
                    found.append((place.where, key, value))
                    self._left.append((place, key))
        return found

    def check(self, constants: list[Tensor]) -> None:
        """Refuse what the traced step has changed in Python: a graph would change it once.

        Raises:
            CompileError: names it.
        """
        for generator in self._found.generators:
            if generator.changes():
                raise CompileError(
                    f"draws from {generator.name('')}, and a graph would use the numbers that came while it was captured at every "
                    "step. Draw with torch (torch.rand), or outside of train_step, and give the numbers with the batch."
                )
        read = {id(t) for t in constants}
        for place in (*self._places, *self._found.by_use):
            for key, old in place.changes():
                if not any(p is place and k == key for p, k in self._left):
                    raise CompileError(
                        f"changes {place.name(key)} in Python, which a graph would do once. Keep it in the state (a buffer of the "
                        "module, state.carry), or change it outside of train_step."
                    )
                if any(id(leaf) in read for _, leaf in named_leaves(old)):
                    raise CompileError(
                        f"reads {place.name(key)} and puts another tensor there for the next step. Keep it in the state (a buffer of "
                        "the module, state.carry), or change the tensor in place."
                    )

    def put_back(self) -> None:
        """Undo what the trace has changed."""
        for place in (
            *self._places,
            *self._found.by_use,
            *self._found.generators,
            *self._found.put_back_only,
        ):
            for key, old in reversed(place.changes()):
                if old is MISSING:
                    del place.where[key]
                else:
                    place.where[key] = old
        for place, key in self._left:
            if key in place.keys:
                place.watch([k for k in place.keys if k != key])
        self._left = []
        self._flatten()
