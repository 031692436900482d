"""Cut tables of tensors into files: one owner for each tensor, one file of a table for each owner.

Names and index are those that Hugging Face gives to a model in several files, so that what opens one opens the other.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

import attrs

from steploop.checkpoint.format.layout import TensorSpec, file_order
from steploop.errors import CheckpointDamagedError

__all__ = [
    "Shard",
    "cut",
    "index_bytes",
    "index_name",
    "lightest_first",
    "metadata_of",
    "owners_of",
    "writers",
]

# Below this a further file costs more than its writer saves, and a small model stays the one file that it is without ranks.
LEAST_SHARE_BYTES = 64 << 20

Tables = Mapping[str, Mapping[str, TensorSpec]]


@attrs.frozen
class Shard:
    """A file that holds some tensors of a table.

    Attributes:
        table: the name of the table, which is also the name of its file where one file holds all.
        names: its tensors, in the order of the file.
        owner: the rank that writes it.
    """

    table: str
    names: tuple[str, ...]
    owner: int = 0


def lightest_first(sizes: Mapping[Any, int], count: int) -> dict[Any, int]:
    """Give each thing to one of ``count`` ranks: the heaviest first, always to the rank that has least.

    A function of its arguments: every rank finds the same.
    """
    loads, found = [0] * count, {}
    for key in sorted(sizes, key=lambda key: (-sizes[key], key)):
        rank = min(range(count), key=lambda one: (loads[one], one))
        loads[rank] += sizes[key]
        found[key] = rank
    return found


def writers(tables: Tables, count: int) -> int:
    """How many of ``count`` ranks write: the first ones, as many as get ``LEAST_SHARE_BYTES`` each."""
    total = sum(spec.size for table in tables.values() for spec in table.values())
    return max(1, min(count, total // LEAST_SHARE_BYTES))


def owners_of(tables: Tables, count: int) -> dict[tuple[str, str], int]:
    """(table, tensor) -> the rank that writes it."""
    return lightest_first(
        {(t, name): spec.size for t, table in tables.items() for name, spec in table.items()}, count
    )


def cut(tables: Tables, count: int) -> dict[str, Shard]:
    """File name -> what it holds, of a checkpoint that ``count`` ranks write; a table of one file keeps its name."""
    count = writers(tables, count)
    owners = owners_of(tables, count)
    found = {}
    for table, specs in tables.items():
        order = file_order(specs)
        shares = {rank: [name for name in order if owners[table, name] == rank] for rank in range(count)}
        writing = [rank for rank, names in shares.items() if names] or [0]
        for number, rank in enumerate(writing, start=1):
            file = table if len(writing) == 1 else _numbered(table, number, len(writing))
            found[file] = Shard(table, tuple(shares[rank]), rank)
    return found


def _numbered(table: str, number: int, count: int) -> str:
    path = PurePath(table)
    return f"{path.stem}-{number:05d}-of-{count:05d}{path.suffix}"


def index_name(table: str) -> str:
    """The name of the index of a table that stands in several files."""
    return f"{table}.index.json"


def index_bytes(files: Mapping[str, Iterable[str]], specs: Mapping[str, TensorSpec]) -> bytes:
    """The index of a table in several files, as Hugging Face writes it: which file holds which tensor."""
    where = {name: file for file, names in files.items() for name in names}
    content = {"metadata": {"total_size": sum(spec.size for spec in specs.values())}, "weight_map": where}
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def metadata_of(text: str, names: Iterable[str]) -> str:
    """The part of a table's metadata that speaks of some of its tensors; of all of them it is the text itself.

    Raises:
        CheckpointDamagedError: it is no text that steploop writes.
    """
    here = set(names)
    try:
        whole = json.loads(text)
        aliases = {alias: first for alias, first in whole["aliases"].items() if first in here}
        part = {"aliases": aliases, "complex128": [name for name in whole["complex128"] if name in here]}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointDamagedError("The metadata of a table is not what steploop writes.") from error
    return json.dumps(part, sort_keys=True, separators=(",", ":"))
