"""Compare a saved state with the caller's, and map names where they differ."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import attrs
from torch import Tensor

from steploop.core.state.train_state import TrainState
from steploop.errors import CheckpointIncompatibleError

__all__ = ["Migrated", "differences", "migrated"]


@attrs.frozen(kw_only=True)
class Migrated:
    """A saved state as values, before it is built.

    Attributes:
        plain: the plain values of TrainState, but ``hyper``.
        optimizer: the name of the optimizer's class; compared as text, never looked up.
        groups: the parameter names of each group.
        params: name -> tensor, in the saved order.
        buffers: name -> tensor, in the saved order.
        hyper: the hyperparameters of each group.
        slots: parameter name -> slot name -> value.
        ema: name -> average, or None.
        others: further fields of TensorValues that are not empty: extra state, carry.
        grown: buffer name -> its first shape (None: it was None), of those that have another one.
        held_back: the parameters among the trained ones that were frozen by hand.
    """

    plain: Mapping[str, Any]
    optimizer: str
    groups: tuple[tuple[str, ...], ...]
    params: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    hyper: tuple[Mapping[str, Any], ...]
    slots: Mapping[str, Mapping[str, Any]]
    ema: Mapping[str, Tensor] | None
    others: Mapping[str, Any]
    grown: Mapping[str, tuple[int, ...] | None]
    held_back: tuple[str, ...]


def differences(saved: Migrated, like: TrainState) -> list[str]:
    """List what keeps a saved state from loading into ``like``; empty if it fits."""
    machine = like.machine
    ours = machine.optimizer_name
    found = [
        *_tensor_differences("parameter", saved.params, like.tensors.params),
        *_tensor_differences("buffer", *_not_grown(saved, like)),
        *_group_differences(saved.groups, machine.group_names),
    ]
    if saved.optimizer != ours:
        found.append(f"optimizer: saved with {saved.optimizer}, but this state has {ours}")
    elif not _same_hyperparameters(saved, like):
        found.append(
            f"optimizer: the groups of {ours} have other hyperparameters than here: another version of it"
        )
    if saved.plain["precision"] != like.precision:
        found.append(f"precision: saved as {saved.plain['precision']}, but this state has {like.precision}")
    if (saved.plain["scale"] is None) != (saved.plain["precision"] != "fp16"):
        found.append("precision: fp16 has a loss scale, and the others have none")
    if (saved.ema is None) != (like.tensors.ema is None):
        found.append(
            f"ema: {'not saved, but carried by' if saved.ema is None else 'saved, but not carried by'} this state"
        )
    elif saved.ema is not None and like.tensors.ema is not None:
        found += _tensor_differences("ema", saved.ema, like.tensors.ema, ordered=False)
    extra, module = saved.others.get("extra", {}), machine.module
    ours_only = {name for name in like.tensors.extra if name not in module.attributes.known}
    saved_only = {name for name in extra if not module.attributes.is_one(name)}
    found += [
        f"extra state of {name or 'the model'}: {'in the checkpoint only' if name in extra else 'not in the checkpoint'}"
        for name in sorted(ours_only ^ saved_only)
    ]
    strays = [name for name in saved.slots if name not in machine.trainable]
    return found or [f"slots: saved for {name}, which is not trained" for name in strays]


def _same_hyperparameters(saved: Migrated, like: TrainState) -> bool:
    """Whether the groups hold the same keys; an optimizer that is none of torch's may add some while it steps."""
    ours = like.machine.initial_hyper
    if len(saved.hyper) != len(ours):
        return True  # said already: the groups differ
    pairs = zip(saved.hyper, ours, strict=True)
    if like.machine.third_party:
        return all(theirs.keys() >= initial.keys() for theirs, initial in pairs)
    return all(theirs.keys() == initial.keys() for theirs, initial in pairs)


def _not_grown(saved: Migrated, like: TrainState) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Saved buffers and ours, without those whose shape depends on data and was, when made, what it is here."""
    made = like.machine.buffer_shapes

    def first(name: str) -> tuple[int, ...] | None:
        return saved.grown[name] if name in saved.grown else _shape(saved.buffers.get(name))

    grown = {
        name
        for name in like.machine.module.buffer_names()
        if first(name) == made.get(name)
        and _shape(saved.buffers.get(name)) != _shape(like.tensors.buffers.get(name))
    }
    return (
        {n: b for n, b in saved.buffers.items() if n not in grown},
        {n: b for n, b in like.tensors.buffers.items() if n not in grown},
    )


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


def _tensor_differences(
    kind: str, saved: Mapping[str, Tensor], ours: Mapping[str, Tensor], *, ordered: bool = True
) -> Iterator[str]:
    for name, tensor in saved.items():
        if name not in ours:
            yield f"{kind} {name}: in the checkpoint only, {_say(tensor)}"
        elif (tensor.shape, tensor.dtype) != (ours[name].shape, ours[name].dtype):
            yield f"{kind} {name}: saved as {_say(tensor)}, but here it is {_say(ours[name])}"
    yield from (
        f"{kind} {name}: not in the checkpoint, {_say(t)}" for name, t in ours.items() if name not in saved
    )
    if ordered and saved.keys() == ours.keys() and list(saved) != list(ours):
        first = next((a, b) for a, b in zip(saved, ours, strict=True) if a != b)
        yield f"the order of the {kind}s: {first[0]} is saved where this state has {first[1]}"


def _say(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _group_differences(
    saved: tuple[tuple[str, ...], ...], ours: tuple[tuple[str, ...], ...]
) -> Iterator[str]:
    trained, here = {n for names in saved for n in names}, {n for names in ours for n in names}
    yield from (
        f"parameter {name}: trained in the checkpoint, but frozen here" for name in sorted(trained - here)
    )
    yield from (
        f"parameter {name}: frozen in the checkpoint, but trained here" for name in sorted(here - trained)
    )
    if trained == here and saved != ours:
        sizes = [len(names) for names in saved], [len(names) for names in ours]
        yield f"parameter groups: saved with {sizes[0]} parameters each, but here they have {sizes[1]}, or are in another order"


def migrated(saved: Migrated, like: TrainState, names: Mapping[str, str | None]) -> Migrated:
    """Make a saved state fit ``like``; refuse every difference that ``names`` does not cover.

    What a parameter's optimizer keeps for it goes with it, where the optimizer is of the same class and the
    parameter is trained in both; the grouping and, where it differs, the hyperparameters are those of ``like``.

    Args:
        saved: what was read.
        like: what it has to fit.
        names: saved name -> name in ``like``, or None: not loaded, ``like`` keeps its own. Others keep their names.

    Raises:
        CheckpointIncompatibleError: something does not fit that is not named.
    """
    known = {*saved.params, *saved.buffers, *like.tensors.params, *like.tensors.buffers}
    if stray := [name for name in names if name not in known]:
        raise CheckpointIncompatibleError(
            f"migrate: neither the checkpoint nor this state has a parameter or buffer {stray[0]!r}."
        )
    if None in names.values() or saved.ema is None:
        like.check_alive("checkpoint.load with migrate")
    params = _renamed(saved.params, like.tensors.params, names)
    buffers = _renamed(saved.buffers, like.tensors.buffers, names)
    ema = None
    if like.tensors.ema is not None:
        ema = (
            {n: t.clone() for n, t in like.tensors.ema.items()}
            if saved.ema is None
            else _renamed(saved.ema, like.tensors.ema, names)
        )
    found = [
        *_tensor_differences("parameter", params, like.tensors.params, ordered=False),
        *_tensor_differences("buffer", buffers, like.tensors.buffers, ordered=False),
        *_tensor_differences("ema", ema or {}, like.tensors.ema or {}, ordered=False),
    ]
    if found:
        listed = "\n  ".join(found[:10])
        raise CheckpointIncompatibleError(
            f"migrate does not say what becomes of:\n  {listed}\nGive the saved name its new one, or None for 'not loaded'."
        )
    machine = like.machine
    same_class = saved.optimizer == machine.optimizer_name
    trainable = set(machine.trainable)
    moved = _moved(saved.slots, names)
    carried = {n: s for n, s in moved.items() if n in trainable} if same_class else {}
    groups = tuple(tuple(_moved(dict.fromkeys(group), names)) for group in saved.groups)
    keeps_hyper = same_class and groups == machine.group_names
    scale = (
        saved.plain["scale"] if saved.plain["scale"] is not None and like.scale is not None else like.scale
    )
    return attrs.evolve(
        saved,
        plain={**saved.plain, "precision": like.precision, "scale": scale},
        groups=machine.group_names,
        params=params,
        buffers=buffers,
        hyper=saved.hyper if keeps_hyper else like.hyper,
        slots=carried,
        ema=ema,
        others={
            **({"extra": like.tensors.extra} if like.tensors.extra else {}),
            **{k: v for k, v in saved.others.items() if same_class or k != "beside"},
        },
    )


def _moved(values: Mapping[str, Any], names: Mapping[str, str | None]) -> dict[str, Any]:
    """Return the values under their new names, without those that are not loaded."""
    renamed: Iterable[tuple[str | None, Any]] = (
        (names.get(name, name), value) for name, value in values.items()
    )
    return {name: value for name, value in renamed if name is not None}


def _renamed(
    saved: Mapping[str, Tensor], ours: Mapping[str, Tensor], names: Mapping[str, str | None]
) -> dict[str, Tensor]:
    """Return the tensors under their new names, and ours where the map keeps ours."""
    kept = {name: ours[name].detach().clone() for name, new in names.items() if new is None and name in ours}
    return {**_moved(saved, names), **kept}
