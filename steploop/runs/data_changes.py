"""Compare the data of a resume with those of the run, and refuse other data unless asked to take them."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from steploop.errors import DataError
from steploop.runs.contract import Change, sentence

__all__ = ["VALUES", "begins_anew", "changed_data", "changed_order"]


VALUES: Final = "values of the data"  # the name of their change


def changed_data(before: Mapping[str, Any], now: Mapping[str, Any], *, note_counts: bool) -> list[Change]:
    """Which facts about the data themselves are not as recorded; one that is not known on both sides is none.

    Args:
        before: "data" of a phase's record.
        now: the same of what was built.
        note_counts: whether another note means other data; one from another version may be worded otherwise.
    """
    names = {"samples": "samples", "kind": "kind of data set", "content": VALUES}
    names |= {"note": "data"} if note_counts else {}
    return [
        Change(said, before[name], now[name], "data")
        for name, said in names.items()
        if before.get(name) is not None and now.get(name) is not None and before[name] != now[name]
    ]


def changed_order(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Which facts about the batches are not as recorded."""
    names = {"per_epoch": "batches in an epoch", "seed": "seed of the order"}
    return [
        Change(names.get(name, name), value, now[name], "data")
        for name, value in before.items()
        if name in now and now[name] != value
    ]


def begins_anew(
    data: list[Change],
    order: list[Change],
    *,
    epoch: int,
    batch: int,
    restorable: bool,
    requested: bool,
    note: Callable[[str], None],
) -> bool:
    """Whether the epoch that was begun begins anew; False where it goes on at its batch, or none was begun.

    Args:
        data: how the data differ.
        order: how the batches differ.
        epoch: the epoch's number, from 0.
        batch: where the run stands in it; 0 at its beginning, or where it is whole.
        restorable: whether the batches can begin in the middle.
        requested: whether the user asked for it.
        note: gets a sentence on what becomes of the difference.

    Raises:
        DataError: they differ, and nothing was asked for.
    """
    anew = requested and batch > 0
    where = f"batch {batch} of epoch {epoch + 1}"
    if data and not requested:
        raise DataError(
            f"These are not the data of the run: {sentence(data)}. Resume it where its data are (from the directory in "
            "which it was begun, with the same files), or go on with these by --restart-epoch."
        )
    if order and batch > 0 and not requested:
        raise DataError(
            f"The run stands at {where}, and its batches would be others from there on: {sentence(order)}. Samples would be "
            "repeated or left out. Resume it as it was, or begin the epoch anew by --restart-epoch."
        )
    if batch > 0 and not restorable and not requested:
        raise DataError(
            f"The run stands at {where}, and its stream cannot begin in the middle. Begin the epoch anew by "
            "--restart-epoch, which repeats its first batches; or make the stream's function honour `start` and say "
            "Stream(..., restorable=True)."
        )
    if data or order:
        note(f"goes on with other {'data' if data else 'batches'}: {sentence([*data, *order])}")
    if anew:
        note(f"epoch {epoch + 1} begins anew: its first {batch} batches are repeated")
    return anew
