"""One short run in every form that has to give the same bits: donating, pure, cloned, copied, resumed."""

import copy
from functools import reduce

from steploop import checkpoint


def in_every_form(make, step, batches, folder, *, forward_spends=False):
    """Form -> the state at the end.

    Args:
        make: gives a first state; ``make(other=True)`` one with other weights, to load into.
        step: ``(state, batch, donate=True) -> state``.
        batches: of the run; the forms part in the middle of it.
        folder: for a checkpoint.
        forward_spends: whether a forward pass changes trained parameters, so that no form leaves its input whole.
    """

    def fold(state, part, **options):
        return reduce(lambda s, batch: step(s, batch, **options), part, state)

    half = len(batches) // 2
    first, second = batches[:half], batches[half:]
    saved = fold(make(), first)
    checkpoint.save(saved, folder / "half")
    stays = fold(make(), first)
    cloned, copied = stays.clone(), copy.deepcopy(stays)
    alternated, beside = make(), make().clone()
    for batch in batches:
        alternated, beside = step(alternated, batch), step(beside, batch)
    found = {
        "donating": fold(make(), batches),
        "pure": fold(make(), batches, donate=False),
        "pure after donating": fold(fold(make(), first), second, donate=False),
        "after a copy was made": fold(stays, second),
        "cloned": fold(cloned, second),
        "deep-copied": fold(copied, second),
        "saved": fold(saved, second),
        "resumed": fold(checkpoint.load(folder / "half", like=make(other=True)), second),
        "with a clone in turns": alternated,
        "a clone in turns": beside,
    }
    if forward_spends:
        return found
    again = fold(make(), first)
    fold(again, second, donate=False)  # leaves it whole
    found["a pure run before"] = fold(again, second)
    return found
