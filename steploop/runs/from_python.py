"""``steploop.run``: train a recipe from Python, as the command line does."""

import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import attrs
import torch

from steploop.core.interruption import Interrupted
from steploop.errors import ConfigError, RunExistsError
from steploop.recipe.config_values import fields_of
from steploop.recipe.python_recipes import python_recipe
from steploop.recipe.recipe import Logger, Recipe, checked_loggers
from steploop.recipe.recipe_files import RecipeFile, load_recipe_file
from steploop.recipe.recipe_paths import find_recipe
from steploop.runs.conduct import carry_out
from steploop.runs.initial_weights import InitialWeights
from steploop.runs.logs.notebook_screen import NotebookScreen, in_notebook
from steploop.runs.logs.screens import PlainScreen, QuietScreen, Screen, choose_screen
from steploop.runs.members import lead
from steploop.runs.ranks.team import assembled
from steploop.runs.requests import Request, make_request, resume_request
from steploop.runs.signals import StopFlag, exit_code_of
from steploop.runs.summary import Summary
from steploop.runs.trust import require_trust

__all__ = ["launch", "run"]

Progress = Literal["auto", "plain", "none"]


def run(
    recipe: str | Path | Recipe | Callable[..., Recipe] | None = None,
    *,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    init: str | Path | InitialWeights | None = None,
    loggers: Sequence[Logger] = (),
    progress: Progress | bool = "auto",
    device: str = "auto",
    limit_steps: int | None = None,
    checkpoint_every: int | None = None,
    log_every: int | None = None,
    compile: bool | Literal["auto"] | None = None,  # noqa: A002  (as on the command line)
    tensorboard: bool = False,
    csv: bool = False,
    mlflow: bool = False,
    wandb: bool = False,
    layer_norms: int | None = None,
    require_exact: bool = False,
    restart_epoch: bool = False,
    trust: bool = False,
    parts: int | None = None,
    ranks: Literal["exact", "fast"] | None = None,
    rank_timeout: float | None = None,
    **config: Any,
) -> Summary:
    """Train a recipe; the run directory, the exactness and the errors are those of ``steploop run``.

    Args:
        recipe: a recipe file, the name of a shipped recipe, a `Recipe`, or a function that builds one. The parameters of
            such a function are its settings, and one that is called ``device`` gets the device; a function with a
            parameter ``config`` gets a ``Config`` as in a recipe file. A Recipe is copied: it can be run again.
            None, with ``resume``: the recipe that is in the run directory.
        out: directory for the run; it must be empty. None: the next ``runs/<recipe>-<n>``.
        resume: directory of a run to go on with. A recipe that is in no file is given again.
        init: weights to begin with: a run, a checkpoint or a safetensors file; InitialWeights(path=..., rename=...,
            partial=...) for names that differ.
        loggers: get the numbers of each log point and evaluation, in addition to those of the recipe.
        progress: "auto" shows one line that moves in a notebook or terminal, and a line now and then elsewhere; "plain"
            shows whole lines, "none" nothing. True is "auto", False is "none".
        device: "auto", "cpu", "cuda", "cuda:1" or "mps"; a Recipe is trained where its state is.
        limit_steps: stop after so many steps, evaluate and end.
        checkpoint_every: steps between two checkpoints, in addition to one an epoch.
        log_every: steps between two lines; None: ten an epoch, and one in 50 steps at least.
        compile: compile the step into one graph; "auto" takes the faster form; None: as the recipe says.
        tensorboard: write TensorBoard event files into the run directory.
        csv: write metrics.csv into the run directory.
        mlflow: log to MLflow.
        wandb: log to Weights & Biases.
        layer_norms: log the gradient norm of each layer group, named by so many parts of its parameters' names.
        require_exact: refuse to resume where the bits may come out differently.
        restart_epoch: resume at the beginning of an epoch instead of in its middle, with the data that there are now.
        trust: resume a run whose files belong to another user.
        parts: that each batch is cut into, shared by the ranks that torchrun has started; None: one for each rank. With the same
            parts, the number of ranks changes no bit; a resume keeps it.
        ranks: "exact", or "fast", which sums over ranks in the quickest order; None: exact, or as before a resume.
        rank_timeout: seconds that a rank waits for the others before the run ends; 600 unless given.
        config: settings of the recipe, checked by name and type.

    Returns:
        How the run ended. Ctrl-C ends it after the step in hand, which is saved: the Summary says "interrupted", and
        ``resume=summary.run`` goes on. A second Ctrl-C raises KeyboardInterrupt.

    Raises:
        ConfigError: a setting or an option does not fit; nothing was run.
        RunExistsError: ``out`` holds a run already.
        SteploopError: the run failed; ``status.json`` says it too.
        KeyboardInterrupt: Ctrl-C came before there was anything to save; nothing is left behind.

    Example:
        >>> recipe = Recipe(state=state, train_step=train_step, batches=loader, epochs=1)
        >>> summary = steploop.run(recipe, out=folder / "run", progress="none")
        >>> summary.state, summary.steps_applied
        ('finished', 4)
    """
    options: dict[str, Any] = {
        "device": device, "limit_steps": limit_steps, "checkpoint_every": checkpoint_every, "log_every": log_every,
        "compile": compile, "tensorboard": tensorboard, "csv": csv, "mlflow": mlflow, "wandb": wandb,
        "layer_norms": layer_norms, "require_exact": require_exact, "restart_epoch": restart_epoch,
        "parts": parts, "ranks": ranks, "rank_timeout": rank_timeout,
        "init": init if init is None or isinstance(init, InitialWeights) else InitialWeights(path=init),
    }  # fmt: skip
    file: RecipeFile | None
    if recipe is None or isinstance(recipe, (str, Path)):
        file = None if recipe is None else load_recipe_file(find_recipe(str(recipe)))
    else:
        file = python_recipe(recipe, config if resume is None else None)
        if isinstance(recipe, Recipe):
            options["device"] = _device_of(recipe, device)
    if file is not None:
        given = options | {"device": device, "out": out, "resume": resume, "trust": trust}
        _refuse_unclear(file, [name for name, value in given.items() if value not in (None, False, "auto")])
    screen, flag = _screen(progress), StopFlag(second_raises=True)
    try:
        summary = launch(
            file, config, out=None if out is None else Path(out), resume=None if resume is None else Path(resume),
            screen=screen, stop=flag, loggers=checked_loggers(loggers, "steploop.run"), trust=trust, command=("steploop.run",), **options,
        )  # fmt: skip
    except RunExistsError as error:
        holds, _, hint = str(error).partition(". ")
        go_on = (
            f"Go on with it by steploop.run(..., resume={str(out)!r}), or give"
            if "resume" in hint
            else "Give"
        )
        raise RunExistsError(
            f"{holds}. {go_on} another directory as out=..., or none: each run then gets one of its own below runs/."
        ) from None  # a reader of a notebook gets one traceback, not two
    except Interrupted as interrupted:
        if interrupted.signum == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise SystemExit(exit_code_of(interrupted.signum)) from None
    if summary.state == "interrupted" and not isinstance(screen, QuietScreen):
        same = "" if recipe is None or isinstance(recipe, (str, Path)) else "RECIPE, "  # it is in no file
        sys.stdout.write(
            f"Interrupted after step {summary.steps_attempted}, which is saved. "
            f"Go on with: steploop.run({same}resume={summary.run!r})\n"
        )
    return summary


def _device_of(recipe: Recipe, wanted: str) -> str:
    """The device of a Recipe's state; raises ConfigError if another one is wanted."""
    found = str(lead(recipe.state).device)
    if wanted != "auto" and torch.device(wanted) != torch.device(found):
        raise ConfigError(
            f"device={wanted!r}, but the state of this Recipe is on {found}. Make the state there, or give a function with a "
            "parameter device instead of the Recipe."
        )
    return found


def _refuse_unclear(file: RecipeFile, given: Sequence[str]) -> None:
    """Raise ConfigError if a name that was given is an option of the run and a setting of the recipe."""
    if both := [name for name in given if name in fields_of(file.config_class)]:
        raise ConfigError(
            f"{both[0]} is an option of steploop.run and a setting of {file.name} too. Rename the setting, or use the command "
            f"line, where the setting is --set {both[0]}=..."
        )


def _screen(progress: Progress | bool) -> Screen:
    if progress in {"none", False}:
        return QuietScreen()
    if progress == "plain":
        return PlainScreen()
    if progress not in {"auto", True}:
        raise ConfigError(f'progress must be "auto", "plain" or "none", but is {progress!r}.')
    return NotebookScreen() if in_notebook() else choose_screen(quiet=False)


def launch(
    recipe: str | RecipeFile | None,
    values: Mapping[str, Any],
    *,
    out: Path | None,
    resume: Path | None,
    screen: Screen,
    stop: StopFlag | None = None,
    loggers: Sequence[Logger] = (),
    trust: bool = False,
    ranks: Literal["exact", "fast"] | None = None,
    rank_timeout: float | None = None,
    **options: Any,
) -> Summary:
    """Begin a run or go on with one: what the command line and ``steploop.run`` share.

    Args:
        recipe: a path, the name of a shipped recipe, or a recipe that was loaded; None: that of the run to go on with.
        values: settings of its Config.
        out: directory for a new run, or None.
        resume: directory of a run to go on with, or None.
        screen: where progress is shown.
        stop: the flag that signals set.
        loggers: in addition to those of the recipe.
        trust: go on with a run whose files belong to another user.
        ranks: how sums over parts are taken; None: exact, or as before a resume.
        rank_timeout: seconds that a rank waits for the others.
        options: fields of Plan and of Request.

    Raises:
        SteploopError: see ``carry_out``, ``make_request`` and ``resume_request``.
    """
    if ranks not in {None, "exact", "fast"}:
        raise ConfigError(f'ranks must be "exact" or "fast", but is {ranks!r}.')
    options["fast"] = None if ranks is None else ranks == "fast"
    with assembled(limit_s=rank_timeout) as team:
        if not team.first:
            screen, loggers = QuietScreen(), ()
        name = recipe.name if isinstance(recipe, RecipeFile) else Path(recipe or "").stem
        if resume is None and (begun := team.begun_before(out, name)) is not None:
            # torchrun has started the ranks again: they go on with the run that they began, by the copy of its recipe
            recipe, values, out, resume = None if isinstance(recipe, str) else recipe, {}, None, begun
            options |= {"init": None, "restart_epoch": False}
        request = _request(recipe, values, out=out, resume=resume, trust=trust, team=team, **options)
        request = attrs.evolve(request, launched_by=team.launch)
        return carry_out(request, screen, stop, loggers, team)


def _request(
    recipe: str | RecipeFile | None,
    values: Mapping[str, Any],
    *,
    out: Path | None,
    resume: Path | None,
    trust: bool,
    **options: Any,
) -> Request:
    if resume is not None:
        if out is not None:
            raise ConfigError(
                "--out and --resume are both given. A resumed run goes on in its own directory: leave --out out."
            )
        if options.pop("init", None) is not None:
            raise ConfigError(
                "--init and --resume are both given. A resumed run goes on with its own weights: leave --init out."
            )
        require_trust(resume, trust=trust, command="resume")
        return resume_request(resume, recipe, values, **options)
    if recipe is None:
        raise ConfigError(
            "Which recipe? Give a file or a name, as in steploop run cifar_amp, or --resume DIR."
        )
    if options.get("restart_epoch"):
        raise ConfigError("--restart-epoch is about a run that was begun. Give it to steploop resume DIR.")
    return make_request(recipe, values, out=out, **options)
