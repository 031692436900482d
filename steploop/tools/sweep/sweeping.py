"""``steploop.sweep``: run a recipe over many settings, as the command line does."""

import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from steploop.core.interruption import Interrupted
from steploop.errors import ConfigError
from steploop.recipe.python_recipes import python_recipe
from steploop.recipe.recipe import Recipe
from steploop.recipe.recipe_files import RecipeFile, load_recipe_file
from steploop.recipe.recipe_paths import find_recipe
from steploop.runs.signals import StopFlag
from steploop.tools.sweep.sweep_launch import launch_sweep
from steploop.tools.sweep.sweep_result import SweepResult

__all__ = ["sweep"]


def sweep(
    recipe: str | Path | Callable[..., Recipe] | None = None,
    grid: Mapping[str, Any] | None = None,
    *,
    seeds: int | Iterable[int] | None = None,
    jobs: int = 1,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    search: Literal["grid", "optuna"] = "grid",
    trials: int | None = None,
    prune: bool = True,
    search_seed: int = 0,
    storage: str | None = None,
    cluster: str | None = None,
    cluster_options: Mapping[str, Any] | None = None,
    progress: Literal["auto", "plain", "none"] = "auto",
    trust: bool = False,
    vectorise: Literal["auto", "on", "off"] | None = None,
    **options: Any,
) -> SweepResult:
    """Train a recipe with every combination of some settings; what it does is what ``steploop sweep`` does.

    Each member is an ordinary run directory below the sweep's: it can be resumed, reported and exported alone. A member
    that fails does not end the others. A sweep that was killed goes on by ``resume=DIR``, and ends as if it had not been.

    Args:
        recipe: a recipe file, the name of a shipped recipe, or a function that builds a Recipe from its settings. The
            members of a file are processes; those of a function run in this process, one after the other. With
            ``resume``, only a function is given again.
        grid: setting -> the values that are tried (a list), or one value for all; or a text as on the command line, such
            as ``"0.01,0.1"``, or ``"1e-4..1e-1:log"`` for a search.
        seeds: how many seeds, from 0 on, or which: each combination is run with each of them.
        jobs: how many members run at once; they share the cores.
        out: directory for the sweep; None: the next ``runs/<recipe>-sweep-<n>``.
        resume: directory of a sweep to go on with; its settings stay.
        search: "grid": every combination; "optuna": combinations that Optuna proposes.
        trials: how many runs a search makes.
        prune: whether a search stops runs that do worse than the median of the others at an evaluation.
        search_seed: the seed of the search.
        storage: URL of the search's storage, for several machines; None: ``study.db`` in the directory.
        cluster: "slurm": members are jobs that ``submitit`` submits; "local": its executor on this machine.
        cluster_options: parameters of ``submitit``, such as ``{"timeout_min": 60}``.
        progress: "auto" shows a live table in a terminal, "plain" a line for each member, "none" nothing.
        trust: go on with a sweep whose files belong to another user.
        vectorise: "on" trains members of one shape as one compiled population in this process, "auto" where that is faster,
            "off" none; None: off, or as the sweep was begun.
        options: ``device``, ``limit_steps``, ``checkpoint_every``, ``log_every``, ``compile``, ``tensorboard``, ``csv``,
            ``mlflow`` and ``wandb`` of each run, as in ``steploop.run``.

    Returns:
        The rows, best first, with mean and spread over the seeds. After Ctrl-C its ``interrupted`` is the signal.

    Raises:
        ConfigError: a setting or an option does not fit; nothing was run.
        RunExistsError: ``out`` holds something already.
        RunLockedError: another process runs the sweep.
        CheckpointIncompatibleError: the recipe is not what the sweep was begun with.

    Example:
        >>> def build(rate=0.1, seed=0):
        ...     state = TrainState.create(model, Optimizer(torch.optim.SGD, lr=rate), seed=seed)
        ...     judge = lambda state: evaluate(state, batches, objective)
        ...     return Recipe(
        ...         state=state, train_step=train_step, batches=loader, epochs=1, evaluate=judge, monitor="loss"
        ...     )
        >>> result = steploop.sweep(build, {"rate": [1e-4, 0.3]}, seeds=2, out=folder / "sweep", progress="none")
        >>> result.best.settings, len(result.best.values)
        ({'rate': 0.3}, 2)
    """
    known = (
        "device", "limit_steps", "checkpoint_every", "log_every", "compile", "tensorboard", "csv", "mlflow", "wandb",
    )  # fmt: skip
    if unknown := [name for name in options if name not in known]:
        raise ConfigError(
            f"steploop.sweep has no option {unknown[0]!r}. Settings of the recipe go into grid; options are {', '.join(known)}."
        )
    file: RecipeFile | None = None
    if isinstance(recipe, (str, Path)):
        file = load_recipe_file(find_recipe(str(recipe)))
    elif isinstance(recipe, Recipe):
        raise ConfigError(
            "A Recipe is one value, and has no settings to sweep over. Give a function that builds it: "
            "def build(learning_rate=0.1): return Recipe(...)."
        )
    elif recipe is not None:
        file = python_recipe(recipe, grid if resume is None else None)
    try:
        return launch_sweep(
            file, grid or {}, inside=recipe is not None and not isinstance(recipe, (str, Path)), seeds=seeds, jobs=jobs,
            out=None if out is None else Path(out), resume=None if resume is None else Path(resume), search=search,
            trials=trials, prune=prune, search_seed=search_seed, storage=storage, cluster=cluster,
            cluster_options=cluster_options or {}, progress=progress, stream=sys.stdout, trust=trust,
            stop=StopFlag(second_raises=True), options=options, vectorise=vectorise,
        )  # fmt: skip
    except Interrupted as interrupted:
        if interrupted.signum == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise
