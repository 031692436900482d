"""What a law makes of a recipe: cases to try, or the reason why it does not apply."""

from collections.abc import Callable, Iterator

import attrs

from steploop.core.trees import count_samples
from steploop.tools.check.subjects import Subject

__all__ = ["Case", "Law", "NotApplicable", "amount", "run_of"]

# A case: what it is, in words, and the check itself.
Case = tuple[str, Callable[[], None]]


class NotApplicable(Exception):  # noqa: N818  (no error: the law has nothing to say about this recipe)
    """A law does not apply to a recipe; says why."""


@attrs.frozen
class Law:
    """A law and the cases it makes of a recipe, the smallest first.

    Attributes:
        name: the law in words.
        cases: of a subject.
        quick: whether ``--quick`` tries it: no, where it starts workers or trains for hundreds of steps.
        late: whether ``--quick`` tries it after the others: it starts a process, which takes seconds on a busy machine.
    """

    name: str
    cases: Callable[[Subject], Iterator[Case]]
    quick: bool = True
    late: bool = False


def amount(number: int, noun: str) -> str:
    """A number and its noun: "1 batch", "3 batches"."""
    return f"{number} {noun}" + ("" if number == 1 else "es" if noun.endswith("ch") else "s")


def run_of(subject: Subject, number: int) -> str:
    """So many batches of the subject, in words; with their samples where these can be counted."""
    batches = amount(number, "batch")
    if subject.structure.cut is None:
        return batches
    return f"{batches} of {amount(count_samples(subject.batches[0]) or subject.samples, 'sample')}"
