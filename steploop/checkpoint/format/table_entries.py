"""The tables of tensors in a manifest, written and checked."""

from collections.abc import Mapping
from typing import Any, Final

from steploop.checkpoint.format.layout import MAX_TENSORS, TensorSpec, spec_from_json
from steploop.errors import CheckpointDamagedError

__all__ = ["FORMAT", "json_object", "read_table", "write_table"]

FORMAT: Final = "steploop checkpoint"


def write_table(table: Mapping[str, TensorSpec]) -> dict[str, Any]:
    """Return a table as JSON: tensor name -> dtype, shape and strides."""
    return {name: spec.to_json() for name, spec in table.items()}


def read_table(value: Any, table: str, name: str) -> dict[str, TensorSpec]:
    """Check an untrusted table and return its specs.

    Args:
        value: what the manifest holds.
        table: the name of the table, for messages.
        name: that of the manifest, for messages.

    Raises:
        CheckpointDamagedError: it is no table that ``write_table`` writes.
    """
    entries = json_object(value, f"{name}: tensors of {table}")
    if len(entries) > MAX_TENSORS or "__metadata__" in entries:
        raise CheckpointDamagedError(
            f"{name} has {len(entries)} tensors in {table}; at most {MAX_TENSORS} are read."
        )
    return {key: spec_from_json(key, entry) for key, entry in entries.items()}


def json_object(value: Any, name: str) -> dict[str, Any]:
    """Return ``value``, which has to be an object; CheckpointDamagedError where it is something else."""
    if not isinstance(value, dict):
        raise CheckpointDamagedError(f"{name}: expected an object, but found {str(value)[:80]!r}.")
    return value
