"""How many parts a run's batches have, and how their sums are taken: settled at its start, recorded, kept by a resume."""

from collections.abc import Mapping
from typing import Any

import attrs

from steploop.core.ranks import Ranks
from steploop.data.batches import Batches
from steploop.errors import ConfigError
from steploop.runs.contract import Change

__all__ = ["ranks_record", "recorded_ranks", "refuse_uncuttable", "settled_ranks"]


def settled_ranks(here: Ranks, *, parts: int | None, fast: bool) -> Ranks | None:
    """The ranks of a new run; None for one process that takes whole batches.

    Args:
        here: this process among the ranks.
        parts: that each batch is cut into; None: one for each rank.
        fast: whether sums over parts may depend on the number of ranks.

    Raises:
        ConfigError: the number of ranks does not divide that of the parts.
    """
    wanted = here.size if parts is None else parts
    if wanted % here.size:
        raise ConfigError(
            f"--parts {wanted}: {here.size} ranks cannot share {wanted} parts equally. Give a multiple of {here.size}, or start a "
            f"number of ranks that divides {wanted}."
        )
    if wanted == 1:
        return None
    return attrs.evolve(here, parts=wanted, exact=not fast)


def recorded_ranks(
    here: Ranks, recorded: Mapping[str, Any], *, parts: int | None, fast: bool | None
) -> tuple[Ranks | None, list[Change]]:
    """The ranks of a resume, and what of them is not as it was.

    Args:
        here: this process among the ranks.
        recorded: config.json.
        parts: None: as many as before.
        fast: None: as before.

    Raises:
        ConfigError: other parts than before are given, or the ranks cannot share those.
    """
    before: int = recorded.get("parts", 1)
    if parts not in {None, before}:
        raise ConfigError(
            f"--parts {parts}: the batches of this run have {before}, which decides its sums, its augmentation and its dropout, so "
            "a resume keeps it. Leave --parts out, or begin a new run: steploop run RECIPE --init RUN."
        )
    if before % here.size:
        shared = ", ".join(str(n) for n in range(1, before + 1) if before % n == 0)
        raise ConfigError(
            f"This run was begun with {before} {'part' if before == 1 else 'parts'} to a batch, which {here.size} ranks cannot "
            f"share equally. Resume it on {shared} {'rank' if before == 1 else 'ranks'}."
        )
    was: bool = recorded.get("ranks", "exact") == "fast"
    now = was if fast is None else fast
    changes = [Change("--ranks", _mode(fast=was), _mode(fast=now), "ranks")] if now != was else []
    if now and (size := recorded.get("ranks_started")) not in {None, here.size}:
        changes.append(Change("number of ranks", size, here.size, "ranks"))
    ranks = settled_ranks(here, parts=before, fast=now)
    return ranks, changes


def ranks_record(ranks: Ranks | None) -> dict[str, Any]:
    """What config.json says of a run's ranks."""
    ranks = ranks or Ranks()
    return {"parts": ranks.parts, "ranks": _mode(fast=not ranks.exact), "ranks_started": ranks.size}


def _mode(*, fast: bool) -> str:
    return "fast" if fast else "exact"


def refuse_uncuttable(batches: Batches, ranks: Ranks) -> None:
    """Refuse batches of fewer samples than there are parts.

    Raises:
        ConfigError: says how many samples there are.
    """
    size = getattr(batches, "batch_size", None)
    if type(size) is int and size < ranks.parts:
        raise ConfigError(
            f"A batch of {size} {'sample' if size == 1 else 'samples'} cannot be cut into {ranks.parts} parts. Make the recipe's "
            f"batch_size at least {ranks.parts}, or take fewer parts: --parts {size}."
        )
