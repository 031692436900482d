"""Read the record of a phase from config.json, which a stranger may have changed."""

from collections.abc import Iterator, Mapping
from typing import Any

from steploop.errors import CheckpointDamagedError

__all__ = ["recorded_phase"]

_TYPES: Mapping[str, type] = {
    "data": dict, "batches": dict, "restorable": bool, "monitor": list, "early_stopping": list, "plateau": list, "start": dict,
    "evaluated": str, "unsaved": bool,
}  # fmt: skip


def recorded_phase(recorded: Mapping[str, Any], number: int) -> Mapping[str, Any]:
    """The record of a phase in config.json; empty where there is none, as in version 0.1.0.

    Raises:
        CheckpointDamagedError: it is nothing that ``contract.phase_record`` makes.
    """
    phases = recorded.get("phases") or []
    known = isinstance(phases, list) and number < len(phases)
    found: Any = phases[number] if known else {}
    problem = next(_problems(found), None) if isinstance(phases, list) else "no list"
    if problem is not None:
        raise CheckpointDamagedError(
            f"config.json: phases is damaged or was changed ({problem}). Give --out for a new run."
        )
    return {name: value for name, value in found.items() if value is not None}


def _problems(found: Any) -> Iterator[str]:
    """What in an object is not as a phase has it."""
    if not isinstance(found, dict):
        yield "a phase is no object"
        return
    values = {name: found[name] for name in _TYPES if found.get(name) is not None}
    for name, value in values.items():
        if not isinstance(value, _TYPES[name]):
            yield f"{name} is no {_TYPES[name].__name__}"
            return
    for name in ("monitor", "early_stopping", "plateau"):
        if len(values.get(name, [0, 0])) != 2:
            yield f"{name} is no pair"
    if type(values.get("plateau", [0, 0])[0]) not in {int, float}:
        yield "plateau begins with no rate"
    if type(values.get("batches", {}).get("per_epoch", 0)) is not int:
        yield "batches are not counted"
    yield from _problems_of_start(values.get("start", {}))


def _problems_of_start(start: Mapping[str, Any]) -> Iterator[str]:
    for values in start.values():
        hyper = values.get("hyper") if isinstance(values, dict) else None
        if not isinstance(hyper, list) or not all(isinstance(group, dict) for group in hyper):
            yield "a start has no hyperparameters"
        elif not isinstance(values.get("scale"), (dict, type(None))):
            yield "a loss scale is no object"
