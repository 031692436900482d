"""Sees what others put into a module that computes for a state: other tensors, other layers."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from steploop.core.state.module_places import Place, names_in
from steploop.errors import ConfigError

__all__ = ["ModuleCheck", "changed_behind"]


class ModuleCheck:
    """Whether a module's parameters and layers are those that were put into it, at 10 ns for each.

    Args:
        model: the module.
        places: where its parameters stand.
        hidden: the names of parameters that are seen elsewhere: the whole one may stand in a sharded one's place.
    """

    def __init__(self, model: nn.Module, places: list[Place], hidden: Collection[str]) -> None:
        self._model = model
        modules = list(model.modules())
        hiding = {id(where) for where, _, name in places if name in hidden}
        self._registered = [
            m._parameters for m in modules if m._parameters and id(m._parameters) not in hiding
        ]
        self._places = [place for place in places if place[2] not in hidden]
        self._first = (
            places[0] if places and not hidden else None
        )  # of sharded ones FSDP keeps dtype and device
        self._one_by_one = _not_by_equality(self._places, self._registered)
        self._dicts = [where for m in modules for where in (m._modules, m._parameters, m._buffers)]
        self._sizes = list(map(len, self._dicts))
        self._children = [m._modules for m in modules if m._modules]
        self._known_children = list(map(dict, self._children))
        compared = set(map(id, (*self._registered, *self._children)))
        self._empty = [where for where in self._dicts if not where]
        self._counted = [where for where in self._dicts if where and id(where) not in compared]
        self._counts = list(map(len, self._counted))
        self._names = names_in(model)
        self.note_kind()
        self.note()

    def note(self) -> None:
        """Remember the parameters that stand in the module now."""
        self._expected = list(map(dict, self._registered))

    def note_kind(self) -> None:
        """Remember the dtype and device of its first parameter, which ``model.to()`` changes in all of them, in place."""
        self._kind: tuple[Any, Any] = (None, None)
        if self._first is not None:
            where, key, _ = self._first
            self._kind = where[key].dtype, where[key].device

    def check(self, placed: Mapping[str, Tensor], placing: Mapping[str, Tensor]) -> None:
        """Raise ConfigError if other tensors or layers stand in the module than those that were noted.

        Args:
            placed: the parameters that were put in last.
            placing: those that were being put in, if an exception came between.
        """
        try:
            # dictionaries are compared in C, and by identity: layers have no equality, and that of two tensors of more
            # than one element is no truth
            if (
                self._registered == self._expected
                and self._children == self._known_children
                and not any(self._empty)
                and (not self._counted or list(map(len, self._counted)) == self._counts)
                and (not self._one_by_one or self._each_is(placed))
                and self._first_is_as_it_was()
            ):
                return
        except Exception:  # noqa: BLE001, S110  (whatever a comparison of two tensors raises, they are two)
            pass
        self._explain(placed, placing)

    def _each_is(self, placed: Mapping[str, Tensor]) -> bool:
        return all(where[key] is placed[name] for where, key, name in self._one_by_one)

    def _first_is_as_it_was(self) -> bool:
        """Whether the first parameter has its dtype and device."""
        if self._first is None:
            return True
        where, key, _ = self._first
        first = where[key]
        return first.dtype is self._kind[0] and first.device == self._kind[1]

    def _explain(self, placed: Mapping[str, Tensor], placing: Mapping[str, Tensor]) -> None:
        """Raise ConfigError that names what was changed; after an exception half-way through a placing nothing was."""
        for where, key, name in self._places:
            try:
                found = where[key]
            except (KeyError, IndexError):
                raise changed_behind(f"its parameter {name} was removed") from None
            if found is not placed[name] and found is not placing[name]:
                raise changed_behind(f"its parameter {name} was replaced by another tensor")
        if list(map(len, self._dicts)) != self._sizes:
            raise changed_behind(self._difference())
        if self._first is not None and not self._first_is_as_it_was():
            where, key, name = self._first
            first = where[key]
            raise changed_behind(
                f"its parameters were moved: {name} is {first.dtype} on {first.device} now, and was {self._kind[0]} on "
                f"{self._kind[1]} when the state was made"
            )
        for children, known in zip(self._children, self._known_children, strict=True):
            if children != known:
                name = next(n for n in known if children.get(n) is not known[n])
                raise changed_behind(f"its layer {name!r} was replaced by another one")

    def _difference(self) -> str:
        now = names_in(self._model)
        if added := [name for name in now if name not in self._names]:
            return f"it has new layers, parameters or buffers: {', '.join(added[:5])}"
        removed = [name for name in self._names if name not in now]
        return f"layers, parameters or buffers were removed: {', '.join(removed[:5])}"


def _not_by_equality(places: list[Place], registered: list[Any]) -> list[Place]:
    """The places where ``==`` of dictionaries would not tell one tensor from another, or that stand in others."""
    known = set(map(id, registered))
    return [
        (where, key, name)
        for where, key, name in places
        if id(where) not in known or type(where[key]) is not nn.Parameter or where[key].numel() < 2
    ]


def changed_behind(what: str) -> ConfigError:
    """Make the error for a model that was changed between two steps."""
    return ConfigError(
        f"The model was changed behind the state: {what}. A state trains the tensors that it was made with. Give a state "
        "other values with state.with_params(...); after a change of the model itself, make a new state with "
        "TrainState.create(model, ...)."
    )
