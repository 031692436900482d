"""Load weights alone into a state, to begin a new training with them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, TypeVar

import torch
from torch import Tensor

from steploop.checkpoint.packing import named_members, non_persistent, tied_names
from steploop.checkpoint.weight_files import WeightFile, read_weights
from steploop.checkpoint.weight_table import WeightRow, WeightTable, refuse_gaps
from steploop.core.state.several import State
from steploop.errors import CheckpointIncompatibleError, ConfigError

__all__ = ["load_weights"]

S = TypeVar("S", bound=State)
# what DistributedDataParallel and torch.compile put before every name
_WRAPPERS: Final = ("module", "_orig_mod")


def load_weights(
    path: Path | str,
    *,
    into: S,
    rename: Mapping[str, str | None] | None = None,
    partial: bool | Sequence[str] = False,
    average: bool = False,
    report: Callable[[WeightTable], None] | None = None,
) -> S:
    """A state with the parameters and buffers of a file, and nothing else of it: no epoch, no best, no rate, no moments.

    Args:
        path: a checkpoint of steploop; a safetensors file, of timm for instance; or a directory with a
            ``model.safetensors`` or its shards, as Hugging Face has them. The names are those of ``state_dict()``.
        into: a state, or several by name, whose tensors in a file begin with that name and a dot. It stays as it is.
        rename: name in the file, or what a name begins with before a dot -> what stands in its place here; "" takes it
            away or, on the left, puts it before every name; None: not loaded. The longest one that fits counts.
        partial: False: every parameter and persistent buffer has to be in the file, and nothing else. True: what fits
            by name and shape is loaded. Patterns ("head.*"): what these take may be missing, or have another shape.
        average: of a checkpoint: the averaged weights.
        report: gets the table of what matched.

    Returns:
        A new state. Its average begins at the weights that were loaded. Values of another floating dtype are converted.

    Raises:
        ConfigError: there are no weights at ``path``, or it is a pickle.
        CheckpointDamagedError: they cannot be read.
        CheckpointIncompatibleError: they do not fit; says what is missing, and which prefix to rename if that would do.

    Example:
        >>> _ = checkpoint.save(state, folder / "pretrained")
        >>> new = load_weights(folder / "pretrained", into=state, partial=["2.*"], report=print)
        4 of 4 tensors loaded from ...
        >>> state = load_weights("resnet18.safetensors", into=state, partial=["fc.*"], report=print)  # doctest: +SKIP
        120 of 122 tensors loaded from resnet18.safetensors
          fc.weight  kept      (1000, 512) in the file, (10, 512) here
          fc.bias    kept      (1000,) in the file, (10,) here
    """
    file = read_weights(path, average=average)
    targets = dict(_targets(into))
    found = _renamed(file, rename or {}, targets)
    rows, values = _matched(file, found, targets, _ties(into))
    table = WeightTable(file.path, tuple(rows))
    if report is not None:
        report(table)
    refuse_gaps(table, found, targets, partial)
    return _filled(into, values)


def _renamed(
    file: WeightFile, rename: Mapping[str, str | None], targets: Mapping[str, Tensor]
) -> dict[str, tuple[str, Tensor]]:
    """New name -> (name in the file, tensor)."""
    names = [*file.tensors, *file.aliases]
    wrappers = [f"{wrapper}." for wrapper in _WRAPPERS]
    wrapped = next((w for w in wrappers if names and all(name.startswith(w) for name in names)), "")
    if any(name.startswith(wrapped) for name in targets):
        wrapped = ""
    found: dict[str, tuple[str, Tensor]] = {}
    for name in names:
        new = _new_name(name.removeprefix(wrapped), rename)
        if new is None:
            continue
        if new in found:
            raise ConfigError(
                f"load_weights: rename gives {new!r} to {found[new][0]!r} and to {name!r}. Give each its own."
            )
        found[new] = name, file.tensors[file.aliases.get(name, name)]
    return found


def _new_name(name: str, rename: Mapping[str, str | None]) -> str | None:
    fitting = [key for key in rename if key in {"", name} or name.startswith(f"{key}.")]
    if not fitting:
        return name
    key = max(fitting, key=len)
    new, rest = rename[key], name[len(key) :].lstrip(".")
    return None if new is None else ".".join(part for part in (new, rest) if part)


def _targets(state: State) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that a file has to hold, under its name there."""
    for name, one in named_members(state).items():
        prefix, transient = f"{name}." if name else "", non_persistent(one.machine)
        yield from ((prefix + n, p) for n, p in one.params.items())
        yield from ((prefix + n, b) for n, b in one.buffers.items() if n not in transient)


def _ties(state: State) -> dict[str, str]:
    """Further name -> first name of each parameter that stands in several places."""
    found: dict[str, str] = {}
    for name, one in named_members(state).items():
        prefix = f"{name}." if name else ""
        found |= {prefix + alias: prefix + first for alias, first in tied_names(one.machine).items()}
    return found


def _matched(
    file: WeightFile,
    found: Mapping[str, tuple[str, Tensor]],
    targets: Mapping[str, Tensor],
    ties: Mapping[str, str],
) -> tuple[list[WeightRow], dict[str, Tensor]]:
    """What becomes of each tensor, and the values that are loaded."""
    rows: list[WeightRow] = []
    values: dict[str, Tensor] = {}
    for name, ours in targets.items():
        names = [n for n in (name, *(alias for alias, first in ties.items() if first == name)) if n in found]
        if not names:
            rows.append(WeightRow(name, "kept", "not in the file"))
            continue
        tensors = [found[n][1] for n in names]
        if any(not torch.equal(tensors[0], other) for other in tensors[1:]):
            raise CheckpointIncompatibleError(
                f"{' and '.join(names)} are one parameter here, and different ones in {file.path}. Untie them in the model, "
                f"or leave one out with rename={{{names[1]!r}: None}}."
            )
        old, theirs = found[names[0]]
        if theirs.shape != ours.shape:
            about = f"{tuple(theirs.shape)} in the file, {tuple(ours.shape)} here"
            rows.append(WeightRow(name, "kept", about))
        elif theirs.dtype != ours.dtype and not (theirs.is_floating_point() and ours.is_floating_point()):
            rows.append(WeightRow(name, "kept", f"{_dtype(theirs)} in the file, {_dtype(ours)} here"))
        else:
            values[name] = theirs
            said = [f"as {old}"] if old not in {name, *ties} else []
            said += [f"converted from {_dtype(theirs)}"] if theirs.dtype != ours.dtype else []
            rows.append(WeightRow(name, "loaded", ", ".join(said)))
    used = {*targets, *ties}
    rows += [
        WeightRow(old, "not used", "in the file only") for new, (old, _) in found.items() if new not in used
    ]
    return rows, values


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _filled(into: S, values: Mapping[str, Tensor]) -> S:
    """A copy of the state with these values; averages begin at the weights."""
    copies = {}
    for name, one in named_members(into).items():
        prefix, ours = f"{name}." if name else "", {**one.params, **one.buffers}
        own = {n: values[prefix + n].to(t.dtype) for n, t in ours.items() if prefix + n in values}
        copies[name] = state = one.with_params(own)
        with torch.no_grad():
            for inner, average in (state.ema or {}).items():
                average.copy_({**state.params, **state.buffers}[inner])
    filled: S = copies if isinstance(into, Mapping) else copies[""]  # type: ignore[assignment]
    return filled
