"""Compile a recipe's step for a run, record what the compiler reports, and go on so after a resume."""

from collections.abc import Mapping
from typing import Literal

import attrs

from steploop.recipe.recipe import Recipe
from steploop.runs.journal import RunJournal
from steploop.runs.logs.screens import Screen

__all__ = ["CompiledBefore", "compiled"]


@attrs.frozen
class CompiledBefore:
    """What compiling decided before a resume.

    Attributes:
        form: whether ``auto`` has chosen the compiled step; None where it has not chosen.
        seen: form of a batch -> how often it came.
    """

    form: bool | None = None
    seen: Mapping[str, int] = attrs.field(factory=dict)


def compiled(
    recipe: Recipe,
    mode: bool | Literal["auto"],
    journal: RunJournal,
    screen: Screen,
    before: CompiledBefore = CompiledBefore(),
) -> Recipe:
    """Compile a recipe's step; with mode=False return the recipe unchanged.

    Each sentence of ``steploop.compile`` is a note on the screen and, with the figures known by then, an event of the
    run: how long compiling took, which form was chosen, and what was measured for it. So is each form of batch that may
    be compiled when it comes again.
    """
    if mode is False or (mode == "auto" and before.form is False):
        return recipe
    from steploop.compilation import compile as compile_step  # slow to import, and seldom wanted

    def tell(text: str) -> None:
        screen.note(text)
        known = {name: value for name, value in attrs.asdict(step.figures).items() if value}
        if step.figures.form == "undecided":
            del known["form"], known["reason"]
        journal.event({"event": "compile", "note": text, **known})

    def count(form: str, times: int, attempted: int) -> None:
        journal.event({"event": "compile", "batch_form": form, "seen": times, "attempted": attempted})

    step = compile_step(recipe.train_step, mode=mode, report=tell)
    step.go_on(before.seen, count, chosen=before.form is True)
    return attrs.evolve(recipe, train_step=step)
