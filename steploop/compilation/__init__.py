"""``compile``: a train step as one graph: forward, backward, unscale, clip, optimizer, loss scale."""

from collections.abc import Callable
from typing import Any, Literal

from steploop.compilation.compiled_step import CompiledStep as CompiledStep
from steploop.compilation.compiled_step import Figures as Figures
from steploop.errors import ConfigError

__all__ = ["CompiledStep", "Figures", "compile"]


def compile(  # noqa: A001  (steploop.compile, as in torch.compile)
    train_step: Callable[[Any, Any], Any],
    *,
    mode: Literal[True, "auto"] = True,
    report: Callable[[str], None] | None = None,
) -> CompiledStep:
    """..."""
    if not callable(train_step):
        raise ConfigError(f"compile: expected a train step, (state, batch) -> state, but got {train_step!r}.")
    if mode is not True and mode != "auto":
        raise ConfigError(f"compile: mode must be True or 'auto', but is {mode!r}.")
    return CompiledStep(train_step, mode, report)
