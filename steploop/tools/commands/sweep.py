"""``steploop sweep``: options to a sweep, and its table."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steploop.runs.standard_streams import lasting_streams
from steploop.tools.commands.completion import complete_setting
from steploop.tools.commands.run_options import (
    CHECKPOINT,
    COMPILE,
    COMPILE_MODES,
    CSV,
    DEVICE,
    LIMIT,
    LOG,
    MLFLOW,
    RECIPE,
    TENSORBOARD,
    WANDB,
    CompileMode,
)

if TYPE_CHECKING:
    from steploop.tools.sweep.sweep_result import SweepResult

__all__ = ["sweep"]

_SEARCH, _CLUSTER, _RESUME = "Search", "Cluster", "Going on with a sweep"

SET = typer.Option(
    "--set",
    metavar="NAME=VALUES",
    autocompletion=complete_setting,
    help="A setting and the values to try, as in learning_rate=0.01,0.1. Give a setting that is a list once for each value: "
    "--set widths=8 --set widths=8,8. For a search also a range: LOW..HIGH, or LOW..HIGH:log.",
)
SEEDS = typer.Option(
    metavar="N", help="Run each combination with the seeds 0 to N-1; 3,5 with these two.", show_default=False
)
JOBS = typer.Option(min=1, metavar="K", help="How many members run at once; they share the cores.")
OUT = typer.Option(
    help="Directory for the sweep; it must be empty. Default: runs/<recipe>-sweep-<n>.", show_default=False
)
QUIET = typer.Option("--quiet", help="Show nothing but the table.")
JSON = typer.Option("--json", help="One JSON object instead of the table; progress goes to stderr.")
SEARCH = typer.Option(
    help="grid: every combination. optuna: combinations that Optuna proposes.", rich_help_panel=_SEARCH
)
TRIALS = typer.Option(
    min=1, metavar="N", help="How many runs a search makes.", show_default=False, rich_help_panel=_SEARCH
)
NO_PRUNE = typer.Option(
    "--no-prune", help="Run each trial to its end, however bad it is.", rich_help_panel=_SEARCH
)
SEARCH_SEED = typer.Option(min=0, metavar="N", help="The seed of a search.", rich_help_panel=_SEARCH)
STORAGE = typer.Option(
    metavar="URL",
    help="Where a search keeps its trials, for several machines. Default: study.db in the directory.",
    show_default=False,
    rich_help_panel=_SEARCH,
)
CLUSTER = typer.Option(
    metavar="NAME",
    help="slurm: members are jobs of the cluster, through submitit. local: its executor for one machine.",
    show_default=False,
    rich_help_panel=_CLUSTER,
)
CLUSTER_SET = typer.Option(
    "--cluster-set",
    metavar="NAME=VALUE",
    help="A parameter of submitit, such as timeout_min=60; may be given several times.",
    rich_help_panel=_CLUSTER,
)
VECTORISE = typer.Option(
    metavar="auto|on|off",
    help="Train members whose states have one shape as one compiled population: on, or auto where that is faster. Their numbers are "
    "near those of single runs, not equal to the bit. Default: off.",
    show_default=False,
)
RESUME = typer.Option(
    "--resume", help="Directory of a sweep to go on with.", show_default=False, rich_help_panel=_RESUME
)
TRUST = typer.Option(
    "--trust",
    help="Run the recipe in a sweep's directory whose files belong to another user.",
    rich_help_panel=_RESUME,
)


def sweep(
    recipe: Annotated[str | None, RECIPE] = None,
    *,
    overrides: Annotated[list[str] | None, SET] = None,
    seeds: Annotated[str | None, SEEDS] = None,
    jobs: Annotated[int, JOBS] = 1,
    out: Annotated[Path | None, OUT] = None,
    resume: Annotated[Path | None, RESUME] = None,
    vectorise: Annotated[str | None, VECTORISE] = None,
    search: Annotated[str, SEARCH] = "grid",
    trials: Annotated[int | None, TRIALS] = None,
    no_prune: Annotated[bool, NO_PRUNE] = False,
    search_seed: Annotated[int, SEARCH_SEED] = 0,
    storage: Annotated[str | None, STORAGE] = None,
    cluster: Annotated[str | None, CLUSTER] = None,
    cluster_set: Annotated[list[str] | None, CLUSTER_SET] = None,
    device: Annotated[str, DEVICE] = "auto",
    limit_steps: Annotated[int | None, LIMIT] = None,
    checkpoint_every: Annotated[int | None, CHECKPOINT] = None,
    log_every: Annotated[int | None, LOG] = None,
    compile: Annotated[CompileMode | None, COMPILE] = None,  # noqa: A002  (the option's name)
    tensorboard: Annotated[bool, TENSORBOARD] = False,
    csv: Annotated[bool, CSV] = False,
    mlflow: Annotated[bool, MLFLOW] = False,
    wandb: Annotated[bool, WANDB] = False,
    quiet: Annotated[bool, QUIET] = False,
    as_json: Annotated[bool, JSON] = False,
    trust: Annotated[bool, TRUST] = False,
) -> None:
    """Train RECIPE with every combination of some settings. Each member is a run directory of its own.

    A member that fails does not end the others: exit code 1 says that there is one. A sweep that was stopped or killed
    goes on with --resume DIR.
    """
    options: dict[str, Any] = {
        "device": device, "limit_steps": limit_steps, "checkpoint_every": checkpoint_every, "log_every": log_every,
        "compile": COMPILE_MODES[compile], "tensorboard": tensorboard, "csv": csv, "mlflow": mlflow, "wandb": wandb,
    }  # fmt: skip
    with lasting_streams():
        from steploop.recipe.config_values import split_assignments
        from steploop.recipe.recipe_files import load_recipe_file
        from steploop.recipe.recipe_paths import find_recipe
        from steploop.runs.signals import process_flag
        from steploop.runs.text_names import readable
        from steploop.tools.sweep.search_space import grouped
        from steploop.tools.sweep.sweep_launch import launch_sweep

        result = launch_sweep(
            None if recipe is None else load_recipe_file(find_recipe(recipe)),
            grouped([readable(text) for text in overrides or []]),
            inside=False, seeds=seeds, jobs=jobs, out=out, resume=resume, search=search, trials=trials,
            prune=not no_prune, search_seed=search_seed, storage=storage, cluster=cluster,
            cluster_options=split_assignments(cluster_set or [], option="--cluster-set"),
            progress="none" if quiet else "auto", stream=sys.stderr if as_json else sys.stdout, trust=trust,
            stop=process_flag(), options={k: v for k, v in options.items() if v is not None and v is not False},
            vectorise=vectorise,
        )  # fmt: skip
        code = _finish(result, as_json=as_json)
    if code:
        raise SystemExit(code)


def _finish(result: "SweepResult", *, as_json: bool) -> int:
    """Print the table, what failed, and what to do next; return the exit code."""
    import shlex

    from steploop.runs.safe_text import safe_lines, safe_text
    from steploop.runs.signals import exit_code_of

    if as_json:
        sys.stdout.write(json.dumps(result.to_json(), allow_nan=False) + "\n")
    else:
        sys.stdout.write(f"\n{result}\n\n")
        if result.mode is None and result.metric is not None:
            sys.stdout.write("The recipe monitors no metric: the rows are in the order of the grid.\n")
    for member in result.failed:
        said = safe_lines(member.error or "its process is gone").partition("\n")[0]
        sys.stderr.write(f"{safe_text(member.run)} {member.state}: {said}\n")
    directory = shlex.quote(safe_text(result.path))
    if result.interrupted is not None:
        sys.stderr.write(
            f"Interrupted; every run is saved. Go on with: steploop sweep --resume {directory}\n"
        )
        return exit_code_of(result.interrupted)
    if result.failed:
        again = (
            f" Try them again with: steploop sweep --resume {directory}" if result.search == "grid" else ""
        )
        sys.stderr.write(
            f"{len(result.failed)} of {result.planned} runs failed; see {directory}/logs.{again}\n"
        )
    elif not as_json:
        sys.stdout.write(f"Look at it with: steploop report {directory}\n")
    return 1 if result.failed else 0
