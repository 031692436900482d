"""Build a state from a checkpoint, after comparing names, shapes and dtypes with the caller's.

Nothing is loaded into anything: a difference raises, and the caller's state is as it was.
"""

from collections.abc import Mapping
from typing import Any, Final, get_args

import attrs
from torch import Tensor, nn

from steploop.checkpoint.format.json_values import decode
from steploop.checkpoint.migration import Migrated, differences, migrated
from steploop.checkpoint.packing import MODEL_FILE, OPTIMIZER_FILE, RECORDS, SCALARS, State, members
from steploop.core.early_stopping import Best, StoppingState
from steploop.core.plateau import PlateauState
from steploop.core.precision import LossScale, Precision
from steploop.core.state.ownership import Lease
from steploop.core.state.train_state import TrainState
from steploop.core.trees import map_tensors
from steploop.errors import CheckpointDamagedError, CheckpointIncompatibleError, ConfigError

__all__ = ["restore"]

_RECORD_TYPES: Final[Mapping[str, type[Any]]] = {
    "scale": LossScale,
    "early_stopping": StoppingState,
    "plateau": PlateauState,
    "best": Best,
}
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
    parts, ours = saved["states"], members(like)
    if saved["several"] is not isinstance(like, Mapping) or parts.keys() != ours.keys():
        raise CheckpointIncompatibleError(
            f"The checkpoint holds {_listed(parts, several=saved['several'])}, and it is loaded into "
            f"{_listed(ours, several=isinstance(like, Mapping))}. Pass like= the same states by the same names."
        )
    restored, found = {}, []
    for name, one in ours.items():
        part = _read_part(parts[name], tensors, f"{name}." if name else "")
        problems = differences(part, one) if migrate is None else []
        found += [f"{name}: {problem}" if name else problem for problem in problems]
        if not problems:
            restored[name] = _build(
                part if migrate is None else migrated(part, one, _own(migrate, name)), one
            )
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


def _read_part(values: Any, tensors: Mapping[str, Mapping[str, Tensor]], prefix: str) -> Migrated:
    """Check the values of one saved state and return them."""
    expected = {
        *SCALARS,
        *RECORDS,
        "optimizer",
        "groups",
        "params",
        "buffers",
        "hyper",
        "slots",
        "ema",
        "transient_buffers",
    }
    if not isinstance(values, dict) or values.keys() != expected:
        raise CheckpointDamagedError(
            "A state in the manifest has fields that steploop does not write, or lacks some."
        )
    held = {
        n.removeprefix(prefix): t for n, t in tensors.get(OPTIMIZER_FILE, {}).items() if n.startswith(prefix)
    }
    model = {
        n.removeprefix(prefix): t for n, t in tensors.get(MODEL_FILE, {}).items() if n.startswith(prefix)
    }
    part = {key: decode(values[key], key, held) for key in expected - {*SCALARS, *RECORDS}}
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
    if len(part["groups"]) != len(part["hyper"]):
        raise CheckpointDamagedError(
            "The manifest names another number of parameter groups than it has hyperparameters for."
        )
    values_of = model | transient
    if missing := [name for name in (*part["params"], *part["buffers"]) if name not in values_of]:
        raise CheckpointDamagedError(f"The manifest names {missing[0]!r}, but no file holds it.")
    return Migrated(
        scalars={key: _scalar(key, values[key]) for key in SCALARS},
        records={key: _record(key, values[key]) for key in RECORDS},
        optimizer=part["optimizer"],
        groups=tuple(tuple(some) for some in part["groups"]),
        params={name: values_of[name] for name in part["params"]},
        buffers={name: values_of[name] for name in part["buffers"]},
        hyper=tuple(part["hyper"]),
        slots=slots,
        ema=ema,
    )


def _named(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _table_of(value: Any, kind: type) -> bool:
    return _named(value) and all(isinstance(entry, kind) for entry in value.values())


def _scalar(key: str, value: Any) -> Any:
    if key == "precision":
        if value not in get_args(Precision):
            raise CheckpointDamagedError(
                f"precision is {str(value)[:80]!r} in the manifest; expected fp32, bf16 or fp16."
            )
        return value
    if type(value) is not int or not 0 <= value < (1 << 63 if key == "seed" else _MOST_STEPS):
        raise CheckpointDamagedError(
            f"{key} is {str(value)[:80]!r} in the manifest; expected a count below 2**53."
        )
    return value


def _record(key: str, value: Any) -> Any:
    """Make a record of plain values, of the field's own type: no file names a type."""
    if value is None:
        return None
    kind = _RECORD_TYPES[key]
    if not isinstance(value, dict) or value.keys() != {field.name for field in attrs.fields(kind)}:
        raise CheckpointDamagedError(
            f"{key} is {str(value)[:80]!r} in the manifest, which steploop never writes."
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
    device, machine = like.device, like._machine
    params = {name: _leaf(part.params[name].to(p.device), p) for name, p in like._params.items()}
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
    return like.replace(
        _params=params,
        _buffers={name: part.buffers[name].to(b.device) for name, b in like._buffers.items()},
        _slots=slots,
        _ema=None if part.ema is None else {name: part.ema[name].to(device) for name in like._params},
        _lease=Lease(),
        _generation=0,
        _leaves=tuple(params[name] for name in machine.trainable),
        _known=(0, 0),
        hyper=part.hyper,
        **part.scalars, **part.records,
        _graph=None, _old_buffers=None, _grads=None, loss=None, outputs=None, grad_norm=None, clipped_norm=None, finite=None,
    )  # fmt: skip


def _leaf(values: Tensor, like: Tensor) -> Tensor:
    if isinstance(like, nn.Parameter):
        return nn.Parameter(values, requires_grad=like.requires_grad)
    return values.requires_grad_(like.requires_grad)


def _counts_on_device(group: Mapping[str, Any]) -> bool:
    """Whether a slot named ``step`` is on the device, as in ``Optimizer.load_state_dict``."""
    return bool(group.get("capturable") or group.get("fused"))
