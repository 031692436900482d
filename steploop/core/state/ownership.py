"""Who owns a set of tensors, and a module that points at the tensors of one owner at a time."""

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from steploop.errors import SpentStateError

__all__ = ["Holder", "Lease", "ModuleMachine", "module_machine"]


class Lease:
    """The ownership of a set of tensors, passed from state to state: the newest generation has it, the others spent it.

    Attributes:
        generation: grows by one whenever a step function updates the tensors in place; a state is alive as long as
            its own number is this one.
        spender: the step function that did it last.
        torn: whether an update was cut off by an error, so that the tensors are no state's any more.
    """

    __slots__ = ("__weakref__", "generation", "spender", "torn")

    def __init__(self) -> None:
        self.generation = 0
        self.spender = ""
        self.torn = False

    def tear(self) -> None:
        """Leave the tensors to nobody: some of them were updated and others not."""
        self.generation += 1
        self.torn = True

    def spent(self, use: str, generation: int, attempted: object) -> SpentStateError:
        """The error for a use of a state that has given its tensors away.

        Args:
            use: what was tried, for the message.
            generation: the state's own.
            attempted: its attempted steps.
        """
        if self.torn:
            return SpentStateError(
                f"{use}: this state is spent: the optimizer failed in the middle of attempted step {attempted}, "
                "and its tensors are half updated. Go on from a checkpoint, or from a copy that state.clone() or "
                "optimizer_step(state, donate=False) had left."
            )
        # states in between are gone: only the last one to update the tensors is known by name
        spender = self.spender if generation + 1 == self.generation else "optimizer_step"
        return SpentStateError(
            f"{use}: this state is spent: {spender} at attempted step {attempted} updated its tensors in "
            "place and gave them to the state it returned. Go on with that one, keep a copy beforehand with "
            "state.clone(), or leave the old state whole with optimizer_step(state, donate=False)."
        )


class Holder:
    """Remembers whose values a machine holds, without keeping them alive."""

    def __init__(self) -> None:
        self._lease: weakref.ref[Lease] | None = None

    def holds(self, lease: Lease) -> bool:
        """Whether the values are those of ``lease``."""
        return self._lease is not None and self._lease() is lease

    def free(self) -> bool:
        """Whether nobody living owns the values that the machine holds."""
        return self._lease is None or self._lease() is None

    def give_to(self, lease: Lease) -> None:
        """Note that the values are those of ``lease`` from now on."""
        self._lease = weakref.ref(lease)


class ModuleMachine:
    """A module, the places in it where parameters and buffers stand, and the mode each submodule trains in."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.holder = Holder()
        self.param_places = self._places("_parameters", dict(model.named_parameters()))
        self.buffer_places = self._places("_buffers", dict(model.named_buffers()))
        # A model left in eval mode is put back into training; a part put into eval mode on purpose, under a
        # training root, stays there (frozen BatchNorm).
        self.training = [m for m in model.modules() if m.training or not model.training]
        self.frozen = [m for m in model.modules() if model.training and not m.training]

    def _places(self, kind: str, values: Mapping[str, Tensor]) -> list[tuple[dict[str, Any], str, str]]:
        """(dictionary, key, name) wherever a value stands; a tied one stands in several places under one name."""
        names = {id(value): name for name, value in values.items()}
        return [
            (getattr(module, kind), key, names[id(value)])
            for module in self.model.modules()
            for key, value in getattr(module, kind).items()
            if value is not None
        ]

    def place_params(self, params: Mapping[str, Tensor]) -> None:
        """Point the module at these parameters."""
        for where, key, name in self.param_places:
            where[key] = params[name]

    def place_buffers(self, buffers: Mapping[str, Tensor]) -> None:
        """Point the module at these buffers."""
        for where, key, name in self.buffer_places:
            where[key] = buffers[name]

    def layout(self) -> list[tuple[int, str]]:
        """Where values stand, and what stays in eval mode: another layout means a new head, say, or a thawed part."""
        places = [(id(where), key) for where, key, _ in (*self.param_places, *self.buffer_places)]
        return [*places, *((id(module), "eval") for module in self.frozen)]

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied module begins without a machine: nobody holds its values yet."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Likewise for one that is saved and loaded."""
        return type(None), ()

    def params(self) -> dict[str, Tensor]:
        """The parameters that the module points at."""
        return {name: where[key] for where, key, name in self.param_places}

    def buffers(self) -> dict[str, Tensor]:
        """The buffers that the module points at: a forward pass may have replaced them."""
        return {name: where[key] for where, key, name in self.buffer_places}

    def set_training(self, *, training: bool) -> None:
        """Put every submodule into the mode it trains in, or all into eval mode; costs nothing where it is so."""
        for module in self.training:
            if module.training is not training:
                module.training = training
        for module in self.frozen:
            if module.training:
                module.training = False

    def modes(self) -> list[tuple[nn.Module, bool]]:
        """What to hand to ``restore_modes``."""
        return [(m, m.training) for m in self.model.modules()]

    @staticmethod
    def restore_modes(modes: Sequence[tuple[nn.Module, bool]]) -> None:
        """Put every submodule back into the mode that was noted."""
        for module, training in modes:
            module.training = training

    def point(self, lease: Lease, params: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """Make the module hold ``params``; what has to be put back after the call, or None."""
        if self.holder.holds(lease):
            return None
        if self.holder.free():
            self.holder.give_to(lease)
            self.place_params(params)
            return None
        before = self.params()
        self.place_params(params)
        return before


_ATTRIBUTE = "_steploop_machine"


def module_machine(model: nn.Module) -> ModuleMachine:
    """The machine of ``model``: one per module, so that two states of one model know of each other.

    It stands in the module's own dictionary, where the garbage collector sees the cycle; a table of all modules
    would keep every one of them alive. Copying or saving the module leaves it behind.
    """
    machine = model.__dict__.get(_ATTRIBUTE)
    fresh = ModuleMachine(model)
    if isinstance(machine, ModuleMachine):
        if machine.layout() == fresh.layout():
            return machine
        # what has stayed of the module may still be a living state's: the two machines have to know of each other
        fresh.holder = machine.holder
    model.__dict__[_ATTRIBUTE] = fresh
    return fresh
