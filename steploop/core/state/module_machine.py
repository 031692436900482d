"""A module that computes with the values of one state at a time, and sees what others put into it."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from steploop.core.state.module_check import ModuleCheck, changed_behind
from steploop.core.state.module_places import places_in_lists, registered_places
from steploop.core.state.ownership import Holder, Lease
from steploop.core.state.plain_attributes import PlainAttributes
from steploop.core.state.sharded_module import sharded_module
from steploop.core.trees import first_difference

__all__ = ["ModuleMachine", "module_machine"]


class ModuleMachine:
    """A module, the places in it where parameters and buffers stand, and the mode each submodule trains in.

    Attributes:
        model: the module.
        holder: whose values it holds.
        placed: the parameters that were put into the places last.
        extras: name and module of each that overrides ``get_extra_state``.
        attributes: the plain attributes that passes change.
        extra_in_backward: whether a backward pass has changed the extra state: a hook does, or a recomputed layer.
        training: the submodules that train in training mode.
        frozen: those that were put into eval mode on purpose, under a training root (frozen BatchNorm).
        sharded: the parts that ``fully_shard`` was applied to, or None.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.holder = Holder()
        self.sharded = sharded_module(model)
        params = dict(model.named_parameters())
        names = {id(value): name for name, value in params.items()}
        modules = dict(model.named_modules())
        # a buffer that is None may be filled by a forward pass
        self.param_places = registered_places(modules, "_parameters", names)
        self.param_places += places_in_lists(modules, names)
        self.buffer_places = registered_places(
            modules, "_buffers", {id(b): name for name, b in model.named_buffers()}, empty=True
        )
        # the others are caches, which a call by hand may make anew
        self._persistent = [
            (module._buffers, key)
            for module in modules.values()
            for key in module._buffers
            if key not in module._non_persistent_buffers_set
        ]
        # None: not known, as after a pass that failed
        self._buffers_placed: list[Tensor | None] | None = [where[key] for where, key in self._persistent]
        self._check = ModuleCheck(
            model, self.param_places, () if self.sharded is None else self.sharded.names
        )
        self.placed: Mapping[str, Tensor] = params
        self._placing: Mapping[str, Tensor] = params
        plain = nn.Module.get_extra_state
        self.extras = [(name, m) for name, m in modules.items() if type(m).get_extra_state is not plain]
        self.attributes = PlainAttributes(modules)
        self.extra_in_backward = False
        self._backwards = 0
        self.own_train = any(type(m).train is not nn.Module.train for m in modules.values())
        # A model left in eval mode is put back into training.
        self.training = [m for m in modules.values() if m.training or not model.training]
        self.frozen = [m for m in modules.values() if model.training and not m.training]

    # -- parameters and buffers --------------------------------------------------------------------------------

    def place_params(self, params: Mapping[str, Tensor]) -> None:
        """Point the module at these parameters."""
        self._placing = params  # noted first: an exception half-way leaves values that are known
        if self.sharded is not None:
            self.sharded.take_back()
        for where, key, name in self.param_places:
            where[key] = params[name]
        if self.sharded is not None:
            self.sharded.look_again()
        self.placed = params
        self._check.note()

    def place_buffers(self, buffers: Mapping[str, Tensor]) -> None:
        """Point the module at these buffers; one that is not among them is None."""
        self._buffers_placed = None  # an exception half-way leaves any
        for where, key, name in self.buffer_places:
            where[key] = buffers.get(name)
        self._buffers_placed = [where[key] for where, key in self._persistent]

    def take_buffers(self) -> dict[str, Tensor]:
        """The buffers after a pass, which are the state's from now on."""
        self._buffers_placed = [where[key] for where, key in self._persistent]
        return self.buffers()

    def forget_buffers(self) -> None:
        """After a pass that failed half-way the module holds any buffers."""
        self._buffers_placed = None

    def check_buffers(self) -> None:
        """Raise ConfigError if somebody put another tensor in the place of a persistent buffer."""
        placed = self._buffers_placed
        if placed is None:
            return
        for (where, key), tensor in zip(self._persistent, placed, strict=True):
            if where[key] is not tensor:
                name = next(n for at, k, n in self.buffer_places if at is where and k == key)
                raise changed_behind(f"its buffer {name} was replaced by another tensor")

    def buffers(self) -> dict[str, Tensor]:
        """The buffers that the module points at: a forward pass may have replaced them."""
        return {n: b for where, key, n in self.buffer_places if (b := where[key]) is not None}

    def buffer_names(self) -> tuple[str, ...]:
        """The names of all buffers, those that are None too, in the order of the model."""
        return tuple(dict.fromkeys(name for _, _, name in self.buffer_places))

    def holds_buffers(self, buffers: Mapping[str, Tensor]) -> bool:
        """Whether the module points at these buffers already; looks at the first one, for they are placed together."""
        if not self.buffer_places:
            return True
        where, key, name = self.buffer_places[0]
        return where[key] is buffers.get(name)

    def point(
        self, lease: Lease, params: Mapping[str, Tensor], *, checked: bool = False
    ) -> Mapping[str, Tensor] | None:
        """Make the module hold ``params``.

        Args:
            lease: of the state that they belong to.
            params: the parameters.
            checked: whether the module was looked at in this step already.

        Returns:
            What has to be placed again after the call, where another living state owns the module's values.
        """
        if not checked:
            self.check()
        holder = self.holder
        holds = holder.holds(lease)
        if holds or holder.free():
            if self.placed is not params or self._placing is not params:
                self.place_params(params)
            if not holds:
                holder.give_to(lease)
            return None
        before = self.placed
        self.place_params(params)
        return before

    def keep(self) -> Callable[[], None]:
        """A function that puts the module back as it is now: its values, its modes, and whose they are."""
        placed, buffers, modes = self.placed, self.buffers(), [(m, m.training) for m in self.model.modules()]
        extra, owner = self.extra_state() if self.extras else {}, self.holder.owner()
        attributes = self.attributes.seen()

        def restore() -> None:
            self.place_params(placed)
            self.place_buffers(buffers)
            for name, module in self.extras:
                module.set_extra_state(copy.deepcopy(extra[name]))
            self.attributes.put_back(attributes)
            self.holder.restore(owner)
            for module, training in modes:
                module.training = training

        return restore

    # -- what others do to the module ---------------------------------------------------------------------------

    def check(self) -> None:
        """Raise ConfigError if somebody put other tensors or layers into the module."""
        if (
            self.sharded is not None
            and (name := self.sharded.changed(self.placed, self._placing)) is not None
        ):
            raise changed_behind(f"its parameter {name} was replaced by another tensor")
        self._check.check(self.placed, self._placing)

    def layout(self) -> list[tuple[int, Any]]:
        """Where values stand, and what stays in eval mode: another layout means a new head, say, or a thawed part."""
        places = [(id(where), key) for where, key, _ in (*self.param_places, *self.buffer_places)]
        return [*places, *((id(module), "eval") for module in self.frozen)]

    def adopt(self) -> None:
        """Take the parameters that stand in the module as those that were placed: a new state begins with them."""
        self._buffers_placed = [where[key] for where, key in self._persistent]
        if self.sharded is not None:
            self.sharded.take_back()
        now = {name: where[key] for where, key, name in self.param_places}
        self._check.note_kind()  # model.to() changes parameters in place
        if any(now[name] is not tensor for name, tensor in self.placed.items()):
            self._placing = now
            self.placed = now
            self._check.note()
            self.holder.release()  # what the module holds is no living state's any more

    # -- extra state ----------------------------------------------------------------------------------------------

    def keeps_extra_state(self) -> bool:
        """Whether the model keeps anything besides parameters and buffers."""
        return bool(self.extras or self.attributes.known)

    def extra_state(self) -> dict[str, Any]:
        """A copy of what each module's ``get_extra_state`` gives, and of the plain attributes that passes change."""
        own = {name: copy.deepcopy(module.get_extra_state()) for name, module in self.extras}
        return {**own, **self.attributes.values()}

    def set_extra_state(self, extra: Mapping[str, Any]) -> None:
        """Give each module a copy of its extra state and of its plain attributes."""
        for name, module in self.extras:
            if name in extra:
                module.set_extra_state(copy.deepcopy(extra[name]))
        self.attributes.put(extra)

    def looks_at_backward(self) -> bool:
        """Whether the extra state is read after this backward pass: in those numbered 1, 2, 4, 8, ... one looks for changes."""
        self._backwards += 1
        return self.extra_in_backward or not self._backwards & (self._backwards - 1)

    def learn_from_backward(self, seen: Any, before: Mapping[str, Any]) -> None:
        """Note whether a backward pass has changed attributes, which looked so before it, or other extra state."""
        changed = self.attributes.learn(seen, "in its backward pass")
        if self.extras and not changed:
            changed = any(first_difference(before.get(n), m.get_extra_state()) for n, m in self.extras)
        self.extra_in_backward |= changed

    # -- modes ---------------------------------------------------------------------------------------------------

    def set_training(self, *, training: bool) -> None:
        """Put every submodule into the mode it trains in, or all into eval mode; costs nothing where it is so.

        A module whose class has a ``train`` of its own (BatchNorm kept frozen, say) is put into its mode by that.
        """
        if self.own_train:
            self.model.train(training)
            for module in self.frozen:
                module.train(mode=False)
            return
        for module in self.training:
            if module.training is not training:
                module.training = training
        for module in self.frozen:
            if module.training:
                module.training = False

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied module begins without a machine: no state holds its values yet."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Pickle as None: a loaded module begins without a machine too."""
        return type(None), ()


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
            machine.adopt()
            return machine
        # what has stayed of the module may still be a living state's: the two machines have to know of each other
        fresh.holder = machine.holder
    model.__dict__[_ATTRIBUTE] = fresh
    return fresh
