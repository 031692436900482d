"""Optimizer: a frozen description of a torch optimizer, its parameter groups and hyperparameters."""

import fnmatch
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor, nn

from steploop.core.trees import map_tensors
from steploop.errors import ConfigError

__all__ = ["Optimizer", "OptimizerSet", "Selector", "check_rate"]

# Which parameters a group takes: name patterns as in fnmatch ("head.*"), or a predicate on (name, parameter).
Selector = str | Sequence[str] | Callable[[str, Tensor], bool]


def _matches(selector: Selector, name: str, param: Tensor) -> bool:
    if callable(selector):
        return bool(selector(name, param))
    patterns = [selector] if isinstance(selector, str) else selector
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _is_vector(_: str, param: Tensor) -> bool:
    return param.dim() <= 1


@attrs.frozen(init=False)
class Optimizer:
    """A description of a ``torch.optim.Optimizer``; ``TrainState.create`` makes the live one.

    Args:
        torch_class: any subclass of ``torch.optim.Optimizer``, third-party ones too.
        no_decay: the parameters whose ``weight_decay`` is 0: name patterns, a predicate on (name, parameter),
            or True for all vectors and scalars (biases and normalisation), which is what most recipes mean.
        groups: pairs (selector, hyperparameters): the parameters that the selector takes get these
            hyperparameters instead. The first selector that takes a parameter has it. Instead of hyperparameters,
            another ``Optimizer(...)``: its class trains these parameters (Muon for matrices, AdamW for the rest).
        hyperparameters: passed to ``torch_class``; the learning rate is ``lr``.

    A group's ``lr`` is kept in proportion: where ``schedule`` sets the rate to f(step), a group gets
    f(step) * lr_of_group / lr.

    Raises:
        ConfigError: the class refuses a hyperparameter, a rate is negative, nan or infinite, or a selector takes no
            parameter.

    Example:
        >>> Optimizer(torch.optim.AdamW, lr=3e-4, weight_decay=0.1, no_decay=True)
        Optimizer(AdamW, lr=0.0003, weight_decay=0.1, no_decay=True)
    """

    torch_class: type[torch.optim.Optimizer]
    hyperparameters: Mapping[str, Any]
    no_decay: Selector | bool
    groups: tuple[tuple[Selector, "Mapping[str, Any] | Optimizer"], ...]

    def __init__(
        self,
        torch_class: type[torch.optim.Optimizer],
        *,
        no_decay: Selector | bool = False,
        groups: "Sequence[tuple[Selector, Mapping[str, Any] | Optimizer]]" = (),
        **hyperparameters: Any,
    ) -> None:
        if not (inspect.isclass(torch_class) and issubclass(torch_class, torch.optim.Optimizer)):
            raise ConfigError(
                f"Optimizer: expected a subclass of torch.optim.Optimizer, but got {torch_class!r}. "
                "Pass the class itself, as in Optimizer(torch.optim.SGD, lr=0.1)."
            )
        self.__attrs_init__(
            torch_class,
            _python_numbers(hyperparameters),
            no_decay,
            tuple((s, h if isinstance(h, Optimizer) else _python_numbers(h)) for s, h in groups),
        )
        for _, own in self.groups:
            if isinstance(own, Optimizer) and own.groups:
                raise ConfigError(
                    f"{self!r}: an Optimizer within a group has no groups of its own. Write them side by side."
                )

    def __repr__(self) -> str:
        """As it was written."""
        parts = [f"{key}={value!r}" for key, value in self.hyperparameters.items()]
        parts += [f"no_decay={self.no_decay!r}"] if self.no_decay else []
        parts += [f"groups={list(self.groups)!r}"] if self.groups else []
        return f"Optimizer({', '.join([self.torch_class.__name__, *parts])})"

    def _partition(self, params: Mapping[str, Tensor]) -> list[tuple[int, list[str], dict[str, Any]]]:
        """Index of the selector (-1: none), names and hyperparameters of each group; every parameter in exactly one."""
        exempt: Selector = _is_vector if self.no_decay is True else self.no_decay or ()
        chosen: dict[tuple[int, bool], list[str]] = {}
        for name, param in params.items():
            index = next((i for i, (s, _) in enumerate(self.groups) if _matches(s, name, param)), -1)
            chosen.setdefault((index, _matches(exempt, name, param)), []).append(name)
        taken = {index for index, _ in chosen}
        for index, (selector, _) in enumerate(self.groups):
            if index not in taken:
                raise ConfigError(
                    f"Optimizer: group {index} ({selector!r}) takes no parameter that is left. "
                    f"The trainable parameters are {_some(list(params))}."
                )
        if self.no_decay and not any(without for _, without in chosen):
            raise ConfigError(
                f"Optimizer: no_decay={self.no_decay!r} takes no parameter. "
                f"The trainable parameters are {_some(list(params))}."
            )
        # the ungrouped first, then the groups as written; within each, decayed before not decayed
        out = []
        for (index, without), names in sorted(chosen.items()):
            given = self.groups[index][1] if index >= 0 else {}
            own = {} if isinstance(given, Optimizer) else dict(given)
            out.append((index, names, own | {"weight_decay": 0.0} if without else own))
        return out

    def build(
        self, params: Mapping[str, nn.Parameter]
    ) -> tuple[torch.optim.Optimizer, tuple[tuple[str, ...], ...]]:
        """Make the live optimizer over ``params``; the parameter names of each of its groups."""
        if not params:
            raise ConfigError(
                "Optimizer: the model has no parameter that requires a gradient, so there is nothing to train."
            )
        by_class = self._by_class(params)
        live = [self._description(key)._live(params, groups) for key, groups in by_class.items()]
        optimizer = live[0] if len(live) == 1 else OptimizerSet(live)
        return optimizer, tuple(tuple(names) for groups in by_class.values() for _, names, _ in groups)

    def labels(self, params: Mapping[str, Tensor]) -> tuple[str | None, ...]:
        """The selector of each group as it was written, if that is a text; in the order that ``build`` gives them."""
        selectors = [
            self.groups[index][0] if index >= 0 else None
            for groups in self._by_class(params).values()
            for index, _, _ in groups
        ]
        return tuple(selector if isinstance(selector, str) else None for selector in selectors)

    def _by_class(
        self, params: Mapping[str, Tensor]
    ) -> dict[int, list[tuple[int, list[str], dict[str, Any]]]]:
        """The groups of each class: this one's under -1, then those of others, under their index, as written."""
        found: dict[int, list[tuple[int, list[str], dict[str, Any]]]] = {}
        for index, names, own in self._partition(params):
            other = index >= 0 and isinstance(self.groups[index][1], Optimizer)
            found.setdefault(index if other else -1, []).append((index, names, own))
        return found

    def _description(self, index: int) -> "Optimizer":
        """The description whose class trains a group."""
        other = self.groups[index][1] if index >= 0 else self
        return other if isinstance(other, Optimizer) else self

    def _live(
        self, params: Mapping[str, nn.Parameter], groups: list[tuple[int, list[str], dict[str, Any]]]
    ) -> torch.optim.Optimizer:
        """The optimizer of this class over its groups."""
        described = [{"params": [params[name] for name in names], **own} for _, names, own in groups]
        try:
            optimizer = self.torch_class(described, **self.hyperparameters)
        except ConfigError:
            raise
        except Exception as error:  # a class of others may raise anything
            raise ConfigError(
                f"{self!r}: {self.torch_class.__name__} refuses this: {error}. It is made of parameter groups and these "
                "hyperparameters."
            ) from error
        given = {key for _, _, own in groups for key in own} - set(optimizer.defaults)
        unknown = sorted(key for key in given if not _reads(self.torch_class, key))
        if unknown:
            known = ", ".join(sorted(optimizer.defaults))
            raise ConfigError(
                f"{self!r}: {self.torch_class.__name__} has no hyperparameter {', '.join(map(repr, unknown))}. It has: {known}."
            )
        for group in optimizer.param_groups:
            check_rate(f"{self!r}: lr", group.get("lr"))
        return optimizer


class OptimizerSet(torch.optim.Optimizer):
    """Several optimizers over different parameters that step as one; their groups stand one behind the other."""

    def __init__(self, members: Sequence[torch.optim.Optimizer]) -> None:
        self.members: tuple[torch.optim.Optimizer, ...] = ()
        super().__init__([{"params": group["params"]} for m in members for group in m.param_groups], {})
        self.members = tuple(members)
        self.param_groups = [group for member in members for group in member.param_groups]
        self.defaults = members[0].defaults

    @property
    def state(self) -> Any:
        """One dictionary for all: each member looks up its own parameters."""
        return self._state

    @state.setter
    def state(self, state: Any) -> None:
        self._state = state
        for member in self.members:
            member.state = state

    @property
    def _step_supports_amp_scaling(self) -> bool:
        return all(getattr(member, "_step_supports_amp_scaling", False) for member in self.members)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step every member."""
        if closure is not None:
            raise ConfigError(
                "Optimizers of several classes cannot evaluate the loss again: none of them takes a closure."
            )
        scaling = {k: getattr(self, k) for k in ("grad_scale", "found_inf") if hasattr(self, k)}
        for member in self.members:
            for key, value in scaling.items():
                setattr(member, key, value)
            member.step()
            for key in scaling:
                delattr(member, key)


def check_rate(what: str, rate: Any) -> None:
    """Raise ConfigError if a learning rate is a number, or a tensor on the host, that is negative, nan or infinite."""
    if isinstance(rate, Real):
        good = 0.0 <= float(rate) < math.inf
    elif type(rate) is Tensor and rate.device.type == "cpu":
        good = rate.numel() == 1 and 0.0 <= rate.item() < math.inf
    else:
        return
    if not good:
        raise ConfigError(f"{what} must be a finite number >= 0, but is {rate!r}.")


def _python_numbers(hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """The same with Python's numbers in the places of NumPy's, which no checkpoint holds."""
    return {
        key: map_tensors(lambda t: t, value, other=lambda v: v.item() if isinstance(v, np.generic) else v)
        for key, value in hyperparameters.items()
    }


def _reads(torch_class: type[torch.optim.Optimizer], key: str) -> bool:
    """Whether a class of others reads a key of its groups that it does not list among its defaults."""
    if torch_class.__module__.startswith("torch.optim"):
        return False
    try:
        sources = [
            inspect.getsource(c)
            for c in torch_class.__mro__
            if not c.__module__.startswith(("torch", "builtins"))
        ]
        return any(repr(key) in source.replace('"', "'") for source in sources)
    except (OSError, TypeError):  # no source at hand
        return True


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f", ... ({len(names)} in all)" if len(names) > 5 else "")
