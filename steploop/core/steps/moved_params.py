"""Parameters that a model's forward pass changes itself, as a momentum encoder does: found out, copied, brought back."""

from torch import Tensor

from steploop.core.state.copying import lazy_clone, leaf_like, unchanged
from steploop.core.state.train_state import TrainState
from steploop.errors import CompileError

__all__ = ["MovedParams"]


class MovedParams:
    """What the forward passes of a step do to parameters.

    Which ones a model moves is found out in its first pass, on lazy copies of all. From then on passes compute with
    copies of the frozen ones among them, and the first values of the trained ones are kept for a step that is skipped.

    Args:
        state: what the step began with.
        traced: whether the step is being traced.

    Attributes:
        params: the parameters to compute with.
    """

    __slots__ = (
        "_copies",
        "_frozen_versions",
        "_machine",
        "_traced",
        "_untouched",
        "_values",
        "_versions",
        "params",
    )

    def __init__(self, state: TrainState, *, traced: bool) -> None:
        self._machine = machine = state.machine
        self._values = state.tensors
        self._traced = traced
        self._copies: dict[str, Tensor] = {}
        self._untouched: list[tuple[str, Tensor, int]] = []
        self.params = self._chosen()
        self._versions = [leaf._version for leaf in state.tensors.leaves]
        if machine.not_trained:
            self._frozen_versions = [self.params[name]._version for name in machine.not_trained]

    def _chosen(self) -> dict[str, Tensor]:
        """The state's parameters, with copies in the places of those that the model moves."""
        machine, params = self._machine, self._values.params
        if machine.moved is None:
            if self._traced:
                self._untouched = [(name, p, p._version) for name, p in params.items()]
                return params
            self._copies = {name: lazy_clone(p) for name, p in params.items()}
            copied = machine.not_trained
        elif not machine.moved:
            return params
        else:
            if self._traced:
                raise _moves(machine.moved[0])
            self._copies = {name: params[name].detach().clone() for name in machine.moved}
            copied = tuple(name for name in machine.moved if name in machine.not_trained)
        if not copied:
            return params
        return {**params, **{name: leaf_like(params[name], lazy_clone(params[name])) for name in copied}}

    def look(self) -> list[str]:
        """Find out what the passes have moved: the names of the state's own parameters among it.

        Raises:
            CompileError: they moved one while a step is traced.
        """
        machine = self._machine
        if machine.moved is None and not self._traced:
            machine.module.check()  # a layer that the first pass has made
            machine.moved = self._moved()
        for name, param, version in self._untouched:
            if param._version != version:
                raise _moves(name)
        overwritten = self._overwritten()
        if overwritten and not {*overwritten} <= {*(machine.moved or ())}:
            machine.moved = tuple(dict.fromkeys([*(machine.moved or ()), *overwritten]))
        return overwritten

    def frozen(self) -> dict[str, Tensor]:
        """The frozen parameters that the model moves, as the passes left them."""
        moved = self._machine.moved
        return {n: self.params[n] for n in moved if n in self._machine.not_trained} if moved else {}

    def first_values(self, names: list[str]) -> dict[str, Tensor]:
        """The values before the passes; of a parameter that moved for the first time there is none."""
        return {name: self._copies[name] for name in names if name in self._copies}

    def _moved(self) -> tuple[str, ...]:
        """The names of the parameters that the first pass has changed."""
        before, now = self._copies, self.params
        written = self._written()  # a momentum encoder begins as a copy, and its first move changes no value
        frozen = [n for n in self._machine.not_trained if n in written or not unchanged(now[n], before[n])]
        leaves = zip(self._machine.trainable, self._values.leaves, self._versions, strict=True)
        trained = [n for n, leaf, v in leaves if leaf._version != v or not unchanged(leaf, before[n])]
        return (*frozen, *trained)

    def _written(self) -> list[str]:
        """The names of the frozen parameters that the passes wrote to."""
        names = self._machine.not_trained
        if not names:
            return []
        pairs = zip(names, self._frozen_versions, strict=True)
        return [name for name, before in pairs if self.params[name]._version != before]

    def _overwritten(self) -> list[str]:
        """The names of the state's own parameters that were changed in place, through .data too where that is known."""
        machine = self._machine
        known = machine.moved or ()
        versions = [leaf._version for leaf in self._values.leaves]
        if versions == self._versions and not known and not machine.not_trained:
            return []
        late = [name for name in self._written() if name not in known]  # the others were copies
        if versions == self._versions and not known:
            found = late
        else:
            pairs = zip(machine.trainable, versions, self._versions, strict=True)
            found = [*(name for name, now, before in pairs if now != before or name in known), *late]
        if found and self._traced:
            raise _moves(found[0])
        return found


def _moves(name: str) -> CompileError:
    return CompileError(
        f"moves the parameter {name} in its forward pass, which a graph cannot undo where the step is skipped. Run this step in "
        "eager."
    )
