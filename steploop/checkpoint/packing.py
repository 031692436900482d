"""Take a state apart for saving: plain values as JSON, tensors by file and name.

Everything is looked at here, before any file exists: what cannot be stored is refused with nothing written.
"""

import json
import warnings
from collections.abc import Mapping
from typing import Any, Final

import attrs
import torch
from torch import Tensor

from steploop.checkpoint.format.json_values import check_json, encode
from steploop.checkpoint.format.layout import TensorSpec, header_bytes, spec_of
from steploop.checkpoint.left_out import frozen_digests
from steploop.core.state.machine import Machine
from steploop.core.state.parts import TensorValues, field_names, plain_names
from steploop.core.state.several import State, members
from steploop.core.state.sharded import is_sharded
from steploop.core.state.shared_memory import shared_memory
from steploop.core.state.train_state import TrainState
from steploop.errors import CheckpointUnsupportedError, ConfigError, StepOrderError

__all__ = [
    "MODEL_FILE",
    "OPTIMIZER_FILE",
    "OWN_FIELDS",
    "Collected",
    "collect",
    "named_members",
]

MODEL_FILE: Final = "model.safetensors"
OPTIMIZER_FILE: Final = "optimizer.safetensors"

# Values in tensors that stand in files and fields of their own; what else a state holds is stored under its name.
OWN_FIELDS: Final = ("params", "buffers", "slots", "ema")

_LAST_FLOAT32_COUNT: Final = 1 << 24  # float32 has 24 bits: 16,777,216 + 1 is 16,777,216


@attrs.frozen
class Collected:
    """A state taken apart.

    Attributes:
        state: all that is not a tensor, as JSON.
        tensors: file name -> tensor name -> tensor; the state's own tensors, not copies.
        specs: the same with the spec of each.
        metadata: file name -> the text in its header.
        trained: the names of the parameters that are trained, as they stand in the model's file.
    """

    state: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]
    specs: dict[str, dict[str, TensorSpec]]
    metadata: dict[str, str]
    trained: tuple[str, ...]


def named_members(state: State) -> dict[str, TrainState]:
    """The states by name; a single one under the empty name.

    Raises:
        ConfigError: there is none, or a name is not an identifier, as the name of a submodule has to be.
    """
    found = members(state)
    if isinstance(state, Mapping) and (
        not found or not all(isinstance(n, str) and n.isidentifier() for n in found)
    ):
        raise ConfigError(
            f"checkpoint: expected a TrainState or a mapping of names to TrainStates, but got the names {list(state)}. "
            "A name has to be an identifier, such as 'generator'."
        )
    return found


def collect(state: State, *, frozen: bool = True) -> Collected:
    """Take a state, or several, apart for saving.

    Args:
        state: one, or several by name.
        frozen: whether parameters that are not trained are saved too.

    Raises:
        SpentStateError: the state gave its tensors away.
        StepOrderError: it holds gradients that the optimizer has not used: they would be lost.
        CheckpointUnsupportedError: it holds something that a checkpoint cannot.
    """
    tensors: dict[str, dict[str, Tensor]] = {MODEL_FILE: {}, OPTIMIZER_FILE: {}}
    aliases: dict[str, str] = {}
    parts, trained = {}, []
    for name, one in named_members(state).items():
        prefix = f"{name}." if name else ""
        left_out = {} if frozen else frozen_digests(one)
        parts[name] = _collect_one(one, prefix, tensors, left_out)
        aliases |= {prefix + alias: prefix + target for alias, target in tied_names(one.machine).items()}
        trained += [prefix + trainable for trainable in one.machine.trainable]
    specs = {file: {name: spec_of(name, t) for name, t in table.items()} for file, table in tensors.items()}
    metadata = {
        file: _metadata(table, aliases if file == MODEL_FILE else {}) for file, table in specs.items()
    }
    for file, table in specs.items():
        header_bytes(table, metadata[file])
    values = {"several": isinstance(state, Mapping), "states": parts}
    check_json(values)
    return Collected(values, tensors, specs, metadata, tuple(trained))


def _metadata(specs: Mapping[str, TensorSpec], aliases: Mapping[str, str]) -> str:
    """Return what a reader of the file alone needs: names of tied tensors, complex128 tensors."""
    wide = sorted(name for name, spec in specs.items() if spec.dtype == "complex128")
    return json.dumps({"aliases": dict(aliases), "complex128": wide}, sort_keys=True, separators=(",", ":"))


def _collect_one(
    state: TrainState, prefix: str, tensors: dict[str, dict[str, Tensor]], left_out: Mapping[str, str]
) -> dict[str, Any]:
    state.check_alive("checkpoint.save")
    state.machine.check_groups()
    if state.flight.grads is not None:
        raise StepOrderError(
            "checkpoint.save: this state holds gradients that no optimizer step has used, and a checkpoint holds none. "
            "Save the state that optimizer_step returns."
        )
    if state.ranks is None and any(map(is_sharded, state.tensors.params.values())):
        raise CheckpointUnsupportedError(
            "This process has a part of each sharded parameter, and alone it can save none of them. All ranks save together a state "
            "that was made with TrainState.create(..., ranks=ranks)."
        )
    state = state.settle()
    _refuse_shared_memory(state)
    _warn_of_full_counters(state)
    machine = state.machine
    transient = non_persistent(machine)
    model, rest = tensors[MODEL_FILE], tensors[OPTIMIZER_FILE]
    model |= {prefix + name: p for name, p in state.tensors.params.items() if name not in left_out}
    model |= {prefix + name: b for name, b in state.tensors.buffers.items() if name not in transient}
    held: dict[str, Tensor] = {}
    values: dict[str, Any] = {
        name: plain if plain is None or isinstance(plain, (bool, int, float, str)) else _record(plain)
        for name in plain_names(type(state))
        if name != "hyper"
        for plain in [getattr(state, name)]
    }
    buffers = state.tensors.buffers
    values |= {
        "optimizer": machine.optimizer_name,
        "groups": [list(names) for names in machine.group_names],
        "params": list(state.tensors.params),
        "buffers": list(buffers),
        "hyper": encode([dict(group) for group in state.hyper], "hyper", held),
        "slots": encode(state.tensors.slots, "slots", held),
        "ema": None if state.tensors.ema is None else encode(_averages(state, left_out), "ema", held),
        "transient_buffers": encode({n: b for n, b in buffers.items() if n in transient}, "buffers", held),
    }
    # fields that most states leave as they begin are there only where they are something else
    for name, default in _defaults(type(state.tensors)).items():
        value = getattr(state.tensors, name)
        if type(value) is not type(default) or value != default:
            values[name] = encode(value, name, held)
    if left_out:
        values["left_out"] = dict(left_out)
    if held_back := [name for name in machine.trainable if not state.tensors.params[name].requires_grad]:
        values["held_back"] = held_back
    if grown := _grown(machine, buffers):
        values["grown"] = grown
    rest |= {prefix + name: tensor for name, tensor in held.items()}
    return values


def _averages(state: TrainState, left_out: Mapping[str, str]) -> dict[str, Tensor]:
    """The averages, without those that equal a parameter that is left out."""
    params = state.tensors.params
    return {
        name: average
        for name, average in (state.tensors.ema or {}).items()
        if name not in left_out or not torch.equal(average, params[name])
    }


def _defaults(part: type[TensorValues]) -> dict[str, Any]:
    """The fields that are stored under their names, and what they are where nothing was kept."""
    return {
        field.name: field.default.factory() if isinstance(field.default, attrs.Factory) else field.default  # type: ignore[arg-type]
        for field in attrs.fields(part)
        if field.name in field_names(part) and field.name not in OWN_FIELDS
    }


def _record(value: Any) -> dict[str, Any]:
    """A frozen record of plain values (a loss scale, say) as an object."""
    return {key: encode(v, key, {}) for key, v in attrs.asdict(value).items()}


def _grown(machine: Machine, buffers: Mapping[str, Tensor]) -> dict[str, Any]:
    """Name -> shape when the state was made, or null, of each buffer that has another one now."""
    made = machine.buffer_shapes
    return {
        name: None if name not in made else list(made[name])
        for name, b in buffers.items()
        if made.get(name) != tuple(b.shape)
    }


def tied_names(machine: Machine) -> dict[str, str]:
    """Map each further name of a tied parameter to its first name."""
    model = machine.model
    first = {id(p): name for name, p in model.named_parameters()}
    return {n: first[id(p)] for n, p in model.named_parameters(remove_duplicate=False) if first[id(p)] != n}


def non_persistent(machine: Machine) -> set[str]:
    """Name the buffers that the module's ``state_dict`` leaves out."""
    return {
        f"{path}.{name}" if path else name
        for path, module in machine.model.named_modules()
        for name in module._non_persistent_buffers_set
    }


def _refuse_shared_memory(state: TrainState) -> None:
    """Refuse tensors that share memory: they would come back untied."""
    if (shared := shared_memory(state.tensors.params, state.tensors.buffers)) is not None:
        raise CheckpointUnsupportedError(
            f"{shared[0]!r} and {shared[1]!r} lie in the same memory but are two tensors, and loading would untie them. "
            "Assign the same Parameter in both places, or copy one with clone()."
        )


def _warn_of_full_counters(state: TrainState) -> None:
    """Warn that torch's float32 step counts stop at 2**24, and with them the bias correction."""
    steps = (slot["step"] for slot in state.tensors.slots.values() if isinstance(slot.get("step"), Tensor))
    step = next(steps, None)
    if step is not None and step.numel() == 1 and step.item() >= _LAST_FLOAT32_COUNT:
        warnings.warn(
            f"The optimizer's own step count is {step.item():.0f}, where float32 stops counting. What it computes from "
            "the count stays as it is from now on.",
            UserWarning,
            stacklevel=2,
        )
