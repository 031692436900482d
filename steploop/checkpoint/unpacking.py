"""Build a state from a checkpoint, after comparing names, shapes and dtypes with the caller's.

Nothing is loaded into anything: a difference raises, and the caller's state is as it was.
"""

from collections.abc import Mapping
from typing import Any, Final, get_args, get_type_hints

import attrs
from torch import Tensor

from steploop.checkpoint.format.json_values import decode
from steploop.checkpoint.left_out import taken_from
from steploop.checkpoint.migration import Migrated, differences, migrated
from steploop.checkpoint.packing import MODEL_FILE, OPTIMIZER_FILE, OWN_FIELDS, named_members
from steploop.core.precision import Precision
from steploop.core.state.copying import leaf_like
from steploop.core.state.ownership import Lease
from steploop.core.state.parts import field_names, plain_names
from steploop.core.state.several import State
from steploop.core.state.train_state import TrainState
from steploop.core.trees import map_tensors
from steploop.errors import CheckpointDamagedError, CheckpointIncompatibleError, ConfigError

__all__ = ["restore"]

_MOST_STEPS: Final = 1 << 53  # beyond, a float64 (a schedule's argument) skips numbers
_LISTED: Final = 10


def restore(
    saved: Any,
    tensors: Mapping[str, Mapping[str, Tensor]],
    like: State,
    migrate: Mapping[str, str | None] | None,
) -> State:
    """Build the saved state, or states, on the machines and devices of ``like``.

    Args:
        saved: the ``state`` of a manifest.
        tensors: file name -> tensor name -> tensor.
        like: what it has to fit.
        migrate: see ``steploop.checkpoint.load``.

    Raises:
        CheckpointIncompatibleError: it does not fit; lists the first ten differences.
        CheckpointDamagedError: steploop writes no such state.
    """
    if (
        not isinstance(saved, dict)
        or saved.keys() != {"several", "states"}
        or not isinstance(saved["states"], dict)
    ):
        raise CheckpointDamagedError("The state in the manifest is not what steploop writes.")
    parts, ours = saved["states"], named_members(like)
    if saved["several"] is not isinstance(like, Mapping) or parts.keys() != ours.keys():
        raise CheckpointIncompatibleError(
            f"The checkpoint holds {_listed(parts, several=saved['several'])}, and it is loaded into "
            f"{_listed(ours, several=isinstance(like, Mapping))}. Pass like= the same states by the same names."
        )
    restored, found = {}, []
    for name, one in ours.items():
        names = None if migrate is None else _own(migrate, name)
        part = _read_part(parts[name], tensors, f"{name}." if name else "", one, names or {})
        problems = differences(part, one) if migrate is None else []
        found += [f"{name}: {problem}" if name else problem for problem in problems]
        if not problems:
            restored[name] = _build(part if names is None else migrated(part, one, names), one)
    if found:
        more = f"\n  and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
        lines = "\n  ".join(found[:_LISTED])
        raise CheckpointIncompatibleError(
            f"The checkpoint does not fit the state that it is loaded into:\n  {lines}{more}\nLoad it into the "
            "state it was saved from, or say with migrate={saved name: new name, or None} what may differ."
        )
    return restored if isinstance(like, Mapping) else restored[""]


def _listed(parts: Mapping[str, Any], *, several: Any) -> str:
    return f"the states {sorted(parts)}" if several else "a single state"


def _own(migrate: Mapping[str, str | None], name: str) -> Mapping[str, str | None]:
    """Return the part of a map for one of several states: names that begin with the state's."""
    if not name:
        return migrate
    prefix = f"{name}."
    cut = {old.removeprefix(prefix): new for old, new in migrate.items() if old.startswith(prefix)}
    return {old: None if new is None else new.removeprefix(prefix) for old, new in cut.items()}


def _read_part(
    values: Any,
    tensors: Mapping[str, Mapping[str, Tensor]],
    prefix: str,
    like: TrainState,
    names_here: Mapping[str, str | None],
) -> Migrated:
    """Check the values of one saved state and return them."""
    plain = [name for name in plain_names(type(like)) if name != "hyper"]
    fields = ["optimizer", "groups", "params", "buffers", "hyper", "slots", "ema", "transient_buffers"]
    types = get_type_hints(type(like))
    optional = [name for name in field_names(type(like.tensors)) if name not in OWN_FIELDS]
    known = {*plain, *fields}
    if not isinstance(values, dict) or not known <= values.keys() <= known | {
        *optional,
        "grown",
        "held_back",
        "left_out",
    }:
        raise CheckpointDamagedError("A state in the manifest has other fields than steploop writes.")
    held = {
        n.removeprefix(prefix): t for n, t in tensors.get(OPTIMIZER_FILE, {}).items() if n.startswith(prefix)
    }
    model = {
        n.removeprefix(prefix): t for n, t in tensors.get(MODEL_FILE, {}).items() if n.startswith(prefix)
    }
    part = {key: decode(values[key], key, held) for key in fields}
    transient, slots, ema = part["transient_buffers"], part["slots"], part["ema"]
    names = [
        part["params"],
        part["buffers"],
        *(part["groups"] if isinstance(part["groups"], list) else [None]),
    ]
    if not all(isinstance(some, list) and all(isinstance(n, str) for n in some) for some in names):
        raise CheckpointDamagedError("A list of names in the manifest is not a list of texts.")
    if (
        not isinstance(part["optimizer"], str)
        or not _table_of(transient, Tensor)
        or not _table_of(slots, dict)
    ):
        raise CheckpointDamagedError("The optimizer's values in the manifest are not what steploop writes.")
    if not (ema is None or _table_of(ema, Tensor)) or not (
        isinstance(part["hyper"], list) and all(map(_named, part["hyper"]))
    ):
        raise CheckpointDamagedError(
            "The averages or hyperparameters in the manifest are not what steploop writes."
        )
    others = {key: decode(values[key], key, held) for key in optional if key in values}
    if not all(_named(others.get(key, {})) for key in ("beside", "extra")):
        raise CheckpointDamagedError(
            "What the optimizer or a module keeps besides is not in the manifest as steploop writes it."
        )
    if len(part["groups"]) != len(part["hyper"]):
        raise CheckpointDamagedError(
            "The manifest names another number of parameter groups than it has hyperparameters for."
        )
    frozen = taken_from(like, values.get("left_out", {}), names_here)
    values_of = model | transient | frozen
    if ema is not None:
        ema |= {name: tensor.clone() for name, tensor in frozen.items() if name not in ema}
    if missing := [name for name in (*part["params"], *part["buffers"]) if name not in values_of]:
        raise CheckpointDamagedError(f"The manifest names {missing[0]!r}, but no file holds it.")
    return Migrated(
        plain={key: _plain(key, values[key], types[key]) for key in plain},
        optimizer=part["optimizer"],
        groups=tuple(tuple(some) for some in part["groups"]),
        params={name: values_of[name] for name in part["params"]},
        buffers={name: values_of[name] for name in part["buffers"]},
        hyper=tuple(part["hyper"]),
        slots=slots,
        ema=ema,
        others=others,
        grown=_shapes(values.get("grown", {})),
        held_back=_texts(values.get("held_back", [])),
    )


def _texts(value: Any) -> tuple[str, ...]:
    """The names of parameters that were frozen by hand."""
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise CheckpointDamagedError("A list of names in the manifest is not a list of texts.")
    return tuple(value)


def _shapes(value: Any) -> dict[str, tuple[int, ...] | None]:
    """The first shapes of buffers that have grown."""
    if not _named(value) or not all(
        shape is None or (isinstance(shape, list) and all(type(n) is int for n in shape))
        for shape in value.values()
    ):
        raise CheckpointDamagedError(
            "The shapes of grown buffers in the manifest are not what steploop writes."
        )
    return {name: None if shape is None else tuple(shape) for name, shape in value.items()}


def _named(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _table_of(value: Any, kind: type) -> bool:
    return _named(value) and all(isinstance(entry, kind) for entry in value.values())


def _plain(key: str, value: Any, kind: Any) -> Any:
    """A plain value of a state, checked by the type that its field has: nothing in a file names a type."""
    if key == "precision":
        if value not in get_args(Precision):
            raise CheckpointDamagedError(
                f"precision is {str(value)[:80]!r} in the manifest; expected fp32, bf16 or fp16."
            )
        return value
    kinds = [part for part in get_args(kind) if attrs.has(part)]
    if kinds:
        return None if value is None else _record(key, value, kinds[0])
    if type(value) is not int or not 0 <= value < (1 << 63 if key == "seed" else _MOST_STEPS):
        raise CheckpointDamagedError(
            f"{key} is {str(value)[:80]!r} in the manifest; expected a count below 2**53."
        )
    return value


def _record(key: str, value: Any, kind: type[Any]) -> Any:
    """A record of plain values."""
    if not isinstance(value, dict) or value.keys() != {field.name for field in attrs.fields(kind)}:
        raise CheckpointDamagedError(
            f"{key} is {str(value)[:80]!r} in the manifest, which no steploop writes."
        )
    plain = {name: decode(v, f"{key}.{name}", {}) for name, v in value.items()}
    if any(v is not None and not isinstance(v, (bool, int, float)) for v in plain.values()):
        raise CheckpointDamagedError(
            f"{key} holds {str(plain)[:80]} in the manifest, where numbers are expected."
        )
    try:
        return kind(**plain)
    except (ConfigError, TypeError) as error:
        raise CheckpointDamagedError(f"{key} in the manifest is not legal: {error}") from error


def _build(part: Migrated, like: TrainState) -> TrainState:
    """Build a state with its own lease, in the order of ``like``, in which norms are summed."""
    device, machine = like.device, like.machine
    params = {name: leaf_like(p, part.params[name].to(p.device)) for name, p in like.tensors.params.items()}
    for name in machine.trainable:  # one may have been frozen by hand, in the run that was saved or here
        params[name].requires_grad_(name not in part.held_back)
    fused = {
        n: _counts_on_device(group)
        for names, group in zip(machine.group_names, part.hyper, strict=True)
        for n in names
    }
    slots: dict[str, dict[str, Any]] = {}
    for name in machine.trainable:
        slot = part.slots.get(name, {})
        slots[name] = {
            key: value if key == "step" and not fused[name] else map_tensors(lambda t: t.to(device), value)
            for key, value in slot.items()
        }

    def to_device(tree: Any) -> Any:
        return map_tensors(lambda t: t.to(device), tree)

    averages = [*like.tensors.params, *like.tensors.buffers]
    machine.module.attributes.know(part.others.get("extra", {}))
    tensors = type(like.tensors)(
        params=params,
        buffers={
            name: part.buffers[name].to(device)
            for name in machine.module.buffer_names()
            if name in part.buffers
        },
        slots=slots,
        ema=None if part.ema is None else {n: part.ema[n].to(device) for n in averages if n in part.ema},
        leaves=tuple(params[name] for name in machine.trainable),
        **{name: to_device(value) for name, value in part.others.items()},
    )
    return like.replace(
        tensors=tensors,
        flight=type(like.flight)(),
        lease=Lease(),
        generation=0,
        hyper=to_device(part.hyper),
        **part.plain,
    )


def _counts_on_device(group: Mapping[str, Any]) -> bool:
    """Whether a slot named ``step`` is on the device, as in ``Optimizer.load_state_dict``."""
    return bool(group.get("capturable") or group.get("fused"))
