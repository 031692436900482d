"""Take a state apart for saving: plain values as JSON, tensors by file and name.

Everything is looked at here, before any file exists: what cannot be stored is refused with nothing written.
"""

import json
import warnings
from collections.abc import Mapping
from typing import Any, Final

import attrs
from torch import Tensor

from steploop.checkpoint.format.json_values import check_json, encode
from steploop.checkpoint.format.layout import TensorSpec, header_bytes, spec_of
from steploop.core.state.machine import Machine
from steploop.core.state.shared_memory import shared_memory
from steploop.core.state.train_state import TrainState
from steploop.errors import CheckpointUnsupportedError, ConfigError, StepOrderError

__all__ = [
    "IN_FLIGHT",
    "MODEL_FILE",
    "OPTIMIZER_FILE",
    "RECORDS",
    "SCALARS",
    "Collected",
    "State",
    "collect",
    "members",
]

# One state, or several by name (the two networks of a GAN).
State = TrainState | Mapping[str, TrainState]

MODEL_FILE: Final = "model.safetensors"
OPTIMIZER_FILE: Final = "optimizer.safetensors"

# Every field of TrainState stands in exactly one of these; a test fails for one that does not.
SCALARS: Final = (
    "seed", "epoch", "batch", "attempted_steps", "applied_steps", "nonfinite_steps", "precision",
)  # fmt: skip
RECORDS: Final = (
    "scale",
    "early_stopping",
    "plateau",
    "best",
)  # frozen attrs records of plain values, or None
TENSORS: Final = ("_params", "_buffers", "_slots", "_ema", "hyper")
IN_FLIGHT: Final = (
    "_machine", "_lease", "_generation", "_leaves", "_known", "_graph", "_old_buffers", "_grads", "loss", "outputs", "grad_norm",
    "clipped_norm", "finite",
)  # fmt: skip

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


def members(state: State) -> dict[str, TrainState]:
    """Return the states by name; a single state has the empty name.

    Raises:
        ConfigError: there is none, or a name is not an identifier, as the name of a submodule has to be.
    """
    if not isinstance(state, Mapping):
        return {"": state}
    if not state or not all(isinstance(name, str) and name.isidentifier() for name in state):
        raise ConfigError(
            f"checkpoint: expected a TrainState or a mapping of names to TrainStates, but got the names {list(state)}. "
            "A name has to be an identifier, such as 'generator'."
        )
    return dict(state)


def collect(state: State) -> Collected:
    """Take a state, or several, apart for saving.

    Raises:
        SpentStateError: the state gave its tensors away.
        StepOrderError: it holds gradients that the optimizer has not used: they would be lost.
        CheckpointUnsupportedError: it holds something that a checkpoint cannot.
    """
    tensors: dict[str, dict[str, Tensor]] = {MODEL_FILE: {}, OPTIMIZER_FILE: {}}
    aliases: dict[str, str] = {}
    parts, trained = {}, []
    for name, one in members(state).items():
        prefix = f"{name}." if name else ""
        parts[name] = _collect_one(one, prefix, tensors)
        aliases |= {prefix + alias: prefix + target for alias, target in tied_names(one._machine).items()}
        trained += [prefix + trainable for trainable in one._machine.trainable]
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


def _collect_one(state: TrainState, prefix: str, tensors: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
    state.check_alive("checkpoint.save")
    if state._grads is not None:
        raise StepOrderError(
            "checkpoint.save: this state holds gradients that no optimizer step has used, and a checkpoint holds none. "
            "Save the state that optimizer_step returns."
        )
    state = state.settle()
    _refuse_shared_memory(state)
    _warn_of_full_counters(state)
    machine = state._machine
    transient = _non_persistent(machine)
    model, rest = tensors[MODEL_FILE], tensors[OPTIMIZER_FILE]
    model |= {prefix + name: p for name, p in state._params.items()}
    model |= {prefix + name: b for name, b in state._buffers.items() if name not in transient}
    held: dict[str, Tensor] = {}
    values = {key: getattr(state, key) for key in SCALARS}
    values |= {key: _record(getattr(state, key)) for key in RECORDS}
    values |= {
        "optimizer": type(machine.optimizer).__name__,
        "groups": [list(names) for names in machine.group_names],
        "params": list(state._params),
        "buffers": list(state._buffers),
        "hyper": encode([dict(group) for group in state.hyper], "hyper", held),
        "slots": encode(state._slots, "slots", held),
        "ema": None if state._ema is None else encode(state._ema, "ema", held),
        "transient_buffers": encode(
            {n: b for n, b in state._buffers.items() if n in transient}, "buffers", held
        ),
    }
    rest |= {prefix + name: tensor for name, tensor in held.items()}
    return values


def _record(value: Any) -> dict[str, Any] | None:
    return None if value is None else {key: encode(v, key, {}) for key, v in attrs.asdict(value).items()}


def tied_names(machine: Machine) -> dict[str, str]:
    """Map each further name of a tied parameter to its first name."""
    model = machine.model
    first = {id(p): name for name, p in model.named_parameters()}
    return {n: first[id(p)] for n, p in model.named_parameters(remove_duplicate=False) if first[id(p)] != n}


def _non_persistent(machine: Machine) -> set[str]:
    """Name the buffers that the module's ``state_dict`` leaves out."""
    return {
        f"{path}.{name}" if path else name
        for path, module in machine.model.named_modules()
        for name in module._non_persistent_buffers_set
    }


def _refuse_shared_memory(state: TrainState) -> None:
    """Refuse tensors that share memory: they would come back untied."""
    if (shared := shared_memory(state._params, state._buffers)) is not None:
        raise CheckpointUnsupportedError(
            f"{shared[0]!r} and {shared[1]!r} lie in the same memory but are two tensors, and loading would untie them. "
            "Assign the same Parameter in both places, or copy one with clone()."
        )


def _warn_of_full_counters(state: TrainState) -> None:
    """Warn that torch's float32 step counts stop at 2**24, and with them the bias correction."""
    steps = (slot["step"] for slot in state._slots.values() if isinstance(slot.get("step"), Tensor))
    step = next(steps, None)
    if step is not None and step.numel() == 1 and step.item() >= _LAST_FLOAT32_COUNT:
        warnings.warn(
            f"The optimizer's own step count is {step.item():.0f}, where float32 stops counting. What it computes from "
            "the count stays as it is from now on.",
            UserWarning,
            stacklevel=2,
        )
