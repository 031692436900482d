"""Say what helps a step that waits for its batches, by what makes them."""

from collections.abc import Collection
from typing import Any

from steploop.data.accepted import is_tensors
from steploop.data.loader import Loader

__all__ = ["faster_batches"]


def faster_batches(batches: Any, settings: Collection[str]) -> str:
    """What to change so that batches come sooner, as a sentence.

    Args:
        batches: of a recipe.
        settings: names of its Config's fields.
    """
    if not isinstance(batches, Loader):
        return "Make its batches in other processes, or keep them in memory: tensors in a Loader."
    if is_tensors(batches.dataset):
        if batches.augment is not None:
            return "The data are in memory already: the time goes into augment. Let it work on whole batches, or on the device."
        device = " on the device" if batches.device is not None and batches.device.type != "cpu" else ""
        return f"The data are in memory already, where workers do not help: keep them{device} as one tensor, or take larger batches."
    now = batches.num_workers
    option = "--set num_workers=N" if "num_workers" in settings else "Loader(num_workers=N)"
    more = f"more workers than {now}" if now else "workers"
    return f"Prepare the batches in {more} ({option}), or keep the data in memory: tensors in a Loader."
