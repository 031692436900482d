"""Begin a run with the weights of another run, of a checkpoint or of a safetensors file."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs

from steploop.checkpoint import load_weights
from steploop.errors import CheckpointDamagedError
from steploop.recipe.recipe import Recipe
from steploop.runs.directory_reader import checkpoint_folders
from steploop.runs.text_names import native, readable

__all__ = ["InitialWeights", "with_initial_weights"]


def _absolute(path: str | Path) -> Path:
    return Path(path).absolute()


@attrs.frozen(kw_only=True)
class InitialWeights:
    """Which weights a run begins with.

    Attributes:
        path: a run (its newest checkpoint), a checkpoint, or what ``steploop.checkpoint.load_weights`` takes.
        rename: as for ``load_weights``.
        partial: patterns of the tensors that may be missing, left over or of another shape.
    """

    path: Path = attrs.field(converter=_absolute)
    rename: Mapping[str, str | None] = attrs.field(factory=dict)
    partial: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """What config.json says of it."""
        return {"path": readable(self.path), "rename": dict(self.rename), "partial": list(self.partial)}

    @classmethod
    def from_json(cls, recorded: Any) -> "InitialWeights":
        """The inverse of ``to_json``.

        Raises:
            CheckpointDamagedError: it is nothing that a run records.
        """
        try:
            return cls(
                path=native(recorded["path"]),
                rename=dict(recorded["rename"]),
                partial=tuple(recorded["partial"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointDamagedError(
                f"config.json does not say with which weights the run began, but {str(recorded)[:80]!r}."
            ) from error


def with_initial_weights(recipe: Recipe, weights: InitialWeights, note: Callable[[str], None]) -> Recipe:
    """The recipe with these weights in its state; everything else of it is at its beginning.

    Raises:
        ConfigError: there are no weights.
        CheckpointError: they cannot be read, or do not fit.
    """
    found = checkpoint_folders(weights.path)
    state = load_weights(
        found[-1] if found else weights.path,
        into=recipe.state,
        rename=weights.rename,
        partial=weights.partial,
        report=lambda table: note(str(table)),
    )
    return attrs.evolve(recipe, state=state)
