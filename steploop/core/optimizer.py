"""Optimizer: a frozen description of a torch optimizer, its parameter groups and hyperparameters."""

import fnmatch
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from steploop.errors import ConfigError

__all__ = ["Optimizer", "Selector"]

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
            hyperparameters instead. The first selector that takes a parameter has it.
        hyperparameters: passed to ``torch_class``; the learning rate is ``lr``.

    A group's ``lr`` is kept in proportion: where ``schedule`` sets the rate to f(step), a group gets
    f(step) * lr_of_group / lr.

    Raises:
        ConfigError: torch refuses a hyperparameter, or a selector takes no parameter.

    Example:
        >>> Optimizer(torch.optim.AdamW, lr=3e-4, weight_decay=0.1, no_decay=True)
        Optimizer(AdamW, lr=0.0003, weight_decay=0.1, no_decay=True)
    """

    torch_class: type[torch.optim.Optimizer]
    hyperparameters: Mapping[str, Any]
    no_decay: Selector | bool
    groups: tuple[tuple[Selector, Mapping[str, Any]], ...]

    def __init__(
        self,
        torch_class: type[torch.optim.Optimizer],
        *,
        no_decay: Selector | bool = False,
        groups: Sequence[tuple[Selector, Mapping[str, Any]]] = (),
        **hyperparameters: Any,
    ) -> None:
        if not (inspect.isclass(torch_class) and issubclass(torch_class, torch.optim.Optimizer)):
            raise ConfigError(
                f"Optimizer: expected a subclass of torch.optim.Optimizer, but got {torch_class!r}. "
                "Pass the class itself, as in Optimizer(torch.optim.SGD, lr=0.1)."
            )
        self.__attrs_init__(
            torch_class, dict(hyperparameters), no_decay, tuple((s, dict(h)) for s, h in groups)
        )

    def __repr__(self) -> str:
        """As it was written."""
        parts = [f"{key}={value!r}" for key, value in self.hyperparameters.items()]
        parts += [f"no_decay={self.no_decay!r}"] if self.no_decay else []
        parts += [f"groups={list(self.groups)!r}"] if self.groups else []
        return f"Optimizer({', '.join([self.torch_class.__name__, *parts])})"

    def _partition(self, params: Mapping[str, Tensor]) -> list[tuple[list[str], dict[str, Any]]]:
        """Names and hyperparameters of each group; every parameter in exactly one, empty groups refused."""
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
            own = dict(self.groups[index][1]) if index >= 0 else {}
            out.append((names, own | {"weight_decay": 0.0} if without else own))
        return out

    def build(
        self, params: Mapping[str, nn.Parameter]
    ) -> tuple[torch.optim.Optimizer, tuple[tuple[str, ...], ...]]:
        """The live optimizer over ``params``, and the parameter names of each of its groups."""
        if not params:
            raise ConfigError(
                "Optimizer: the model has no parameter that requires a gradient, so there is nothing to train."
            )
        groups = self._partition(params)
        described = [{"params": [params[name] for name in names], **own} for names, own in groups]
        try:
            optimizer = self.torch_class(described, **self.hyperparameters)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{self!r}: {self.torch_class.__name__} refuses this: {error}") from error
        unknown = {key for _, own in groups for key in own} - set(optimizer.defaults)
        if unknown:
            known = ", ".join(sorted(optimizer.defaults))
            raise ConfigError(
                f"{self!r}: {sorted(unknown)} is no hyperparameter of {self.torch_class.__name__}, which has {known}."
            )
        return optimizer, tuple(tuple(names) for names, _ in groups)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f", ... ({len(names)} in all)" if len(names) > 5 else "")
