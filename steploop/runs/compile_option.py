"""Compile a recipe's step for a run, and record what the compiler reports."""

from typing import Literal

import attrs

from steploop.recipe.recipe import Recipe
from steploop.runs.journal import RunJournal
from steploop.runs.logs.screens import Screen

__all__ = ["compiled"]


def compiled(recipe: Recipe, mode: bool | Literal["auto"], journal: RunJournal, screen: Screen) -> Recipe:
    """Compile a recipe's step; with mode=False return the recipe unchanged.

    Each sentence of ``steploop.compile`` is a note on the screen and, with the figures known by then, an event of the
    run: how long compiling took, which form was chosen, and what was measured for it.
    """
    if mode is False:
        return recipe
    from steploop.compilation import compile as compile_step  # slow to import, and seldom wanted

    def tell(text: str) -> None:
        screen.note(text)
        known = {name: value for name, value in attrs.asdict(step.figures).items() if value}
        if step.figures.form == "undecided":
            del known["form"], known["reason"]
        journal.event({"event": "compile", "note": text, **known})

    step = compile_step(recipe.train_step, mode=mode, report=tell)
    return attrs.evolve(recipe, train_step=step)
