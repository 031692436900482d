"""Say which weights of a file matched a state, and refuse gaps that were not allowed."""

import fnmatch
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Literal

import attrs
from torch import Tensor

from steploop.errors import CheckpointIncompatibleError

__all__ = ["WeightRow", "WeightTable", "refuse_gaps"]

Outcome = Literal["loaded", "kept", "not used"]
_HINT: Final = (
    "Say with partial=[pattern, ...] (--init-partial PATTERN) what may be missing or left over, or give names with "
    "rename={old: new} (--init-rename OLD=NEW)."
)
_LISTED: Final = 10


@attrs.frozen
class WeightRow:
    """What became of one tensor.

    Attributes:
        name: in the state; of one that is not used, in the file.
        outcome: "loaded", "kept" (the state's own) or "not used" (of the file).
        about: why, or how.
    """

    name: str
    outcome: Outcome
    about: str = ""


@attrs.frozen
class WeightTable:
    """What matched.

    Attributes:
        path: where the weights come from.
        rows: one for each tensor of the state, and for each of the file that is not used.
    """

    path: Path
    rows: tuple[WeightRow, ...]

    def of(self, outcome: Outcome) -> list[WeightRow]:
        """The rows with an outcome."""
        return [row for row in self.rows if row.outcome == outcome]

    def __str__(self) -> str:
        """A line that counts, and a line for each tensor about which there is something to say."""
        loaded, kept = self.of("loaded"), self.of("kept")
        lines = [f"{len(loaded)} of {len(loaded) + len(kept)} tensors loaded from {self.path}"]
        said = [row for row in self.rows if row.about]
        width = max((len(row.name) for row in said), default=0)
        lines += [f"  {row.name:<{width}}  {row.outcome:<8}  {row.about}" for row in said]
        return "\n".join(lines)


def refuse_gaps(
    table: WeightTable,
    found: Mapping[str, tuple[str, Tensor]],
    targets: Mapping[str, Tensor],
    partial: bool | Sequence[str],
) -> None:
    """Refuse a table in which something did not match that may not be missing.

    Args:
        table: what matched.
        found: the names of the file as they are here.
        targets: the names of the state.
        partial: as for ``load_weights``.

    Raises:
        CheckpointIncompatibleError: lists the first ten gaps.
    """
    patterns = [partial] if isinstance(partial, str) else [] if isinstance(partial, bool) else [*partial]

    def allowed(row: WeightRow) -> bool:
        return partial is True or any(fnmatch.fnmatchcase(row.name, pattern) for pattern in patterns)

    gaps = [row for row in table.rows if row.outcome != "loaded" and not allowed(row)]
    if table.of("loaded") and not gaps:
        return
    listed = [f"{row.name}: {row.about}" for row in (gaps or table.rows)[:_LISTED]]
    more = f"\n  and {len(gaps) - _LISTED} more" if len(gaps) > _LISTED else ""
    hint = _prefix_hint(found, targets) if not table.of("loaded") else ""
    lines = "\n  ".join(listed)
    raise CheckpointIncompatibleError(
        f"{table.path} does not hold the weights of this model:\n  {lines}{more}\n{hint or _HINT}"
    )


def _prefix_hint(found: Mapping[str, object], targets: Mapping[str, object]) -> str:
    """Which one prefix, taken away or put before, would make names match; empty where none would."""
    counts: dict[tuple[str, str], int] = {}
    for names, others, away in ((found, targets, True), (targets, found, False)):
        for name in names:
            parts = name.split(".")
            for n in range(1, len(parts)):
                if ".".join(parts[n:]) in others:
                    prefix = ".".join(parts[:n])
                    key = (prefix, "") if away else ("", prefix)
                    counts[key] = counts.get(key, 0) + 1
    if not counts:
        return ""
    old, new = max(counts, key=lambda key: counts[key])
    return (
        f"{counts[old, new]} names would match with rename={{{old!r}: {new!r}}} "
        f"(--init-rename {shlex.quote(f'{old}={new}')})."
    )
