"""``steploop bench``: time a recipe's step against a hand-written loop."""

import json
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steploop.tools.commands.completion import complete_recipe
from steploop.tools.commands.run_options import DEVICE, SET

if TYPE_CHECKING:
    from steploop.tools.bench.jobs import Job
    from steploop.tools.bench.rounds import Results

__all__ = ["bench"]

RECIPE = typer.Argument(
    help="A recipe file, the name of a shipped recipe, or overhead or smallcnn. Default: cifar_amp on synthetic images.",
    show_default=False, autocompletion=complete_recipe,
)  # fmt: skip
ROUNDS = typer.Option(min=1, help="Rounds in which the contenders take turns.")
PEERS = typer.Option(
    "--no-peers", help="Leave out Lightning Fabric and Accelerate, even where they are installed."
)
NPROC = typer.Option(
    min=1, help="Processes that share each batch: DistributedDataParallel by hand, and steploop on ranks."
)
TUNE = typer.Option("--no-tune", help="Leave the memory allocator's thresholds as they are.")
JSON = typer.Option("--json", help="Print one JSON object with every number, instead of the table.")


def bench(
    recipe: Annotated[str | None, RECIPE] = None,
    *,
    overrides: Annotated[list[str] | None, SET] = None,
    device: Annotated[str, DEVICE] = "auto",
    rounds: Annotated[int, ROUNDS] = 7,
    nproc: Annotated[int, NPROC] = 1,
    no_peers: Annotated[bool, PEERS] = False,
    no_tune: Annotated[bool, TUNE] = False,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Time RECIPE's step against a hand-written loop."""
    from steploop.recipe.recipe_paths import find_recipe
    from steploop.recipe.written_settings import settings_in
    from steploop.tools.bench.data_advice import faster_batches
    from steploop.tools.bench.handwritten import installed_peers
    from steploop.tools.bench.jobs import CASES, CONTENDERS, RANK_CONTENDERS, Job
    from steploop.tools.bench.rank_workers import RankWorkers
    from steploop.tools.bench.rounds import Worker, measure

    settings = list(overrides or [])
    if recipe is None:
        recipe, settings = "cifar_amp", ["data=synthetic", *settings]
    job = Job(
        recipe=(CASES.get(recipe) or find_recipe(recipe)).resolve(),
        overrides=tuple(settings),
        device=device,
        nproc=nproc,
        tune=not no_tune,
    )
    built, _ = job.build()  # a mistake is said here, once, and not by every contender
    remedy = faster_batches(built.batches, [setting.name for setting in settings_in(job.recipe)])
    del built
    names = [
        *(CONTENDERS if nproc == 1 else RANK_CONTENDERS),
        *([] if no_peers else installed_peers()),
    ]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        workers = partial(Worker, environment=_with_cache(cache)) if nproc == 1 else RankWorkers
        results = measure(job, names, rounds=rounds, report=lambda line: _say(f"{line}\n"), workers=workers)
    sys.stdout.write(
        json.dumps(_to_json(job, results, remedy), allow_nan=False) + "\n"
        if as_json
        else _table(job, results, remedy)
    )


def _with_cache(folder: str) -> dict[str, str]:
    """This process's environment, but for the folder where torch keeps what it compiles."""
    kept = {
        k: v for k, v in os.environ.items() if k != "TRITON_CACHE_DIR"
    }  # it lies in torch's, unless it is set
    return {**kept, "TORCHINDUCTOR_CACHE_DIR": folder}


def _say(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def _conditions(job: "Job") -> str:
    """Say in one line what the numbers depend on."""
    import platform

    import torch

    from steploop import __version__
    from steploop.runs.environment import find_device

    device = find_device(job.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    threads = torch.get_num_threads() if job.nproc == 1 else os.environ.get("OMP_NUM_THREADS", "1")
    ranks = "" if job.nproc == 1 else f"{job.nproc} ranks, each with "
    return (
        f"{job.recipe.stem} on {where}, {ranks}{threads} threads of {os.cpu_count()} processors; steploop {__version__}, "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )


def _table(job: "Job", results: "Results", remedy: str) -> str:
    """Format the table, the share of waiting, and the advice."""
    from steploop.tools.bench.rounds import advice

    head = ("", "us/step", "samples/s", "MiB", "ratio", "spread", "first 3")
    lines: list[tuple[str, ...]] = [head]
    for row in results.rows:
        if row.error:
            continue
        lines.append((
            row.name,
            f"{row.best_us:,.0f}",
            f"{row.samples_per_s or 0:,.0f}",
            "-" if row.peak_mib is None else f"{row.peak_mib:,.0f}",
            f"{row.ratio:.2f}",
            f"{min(row.ratios):.2f} to {max(row.ratios):.2f}",
            f"{row.first_s or 0:.1f} s",
        ))  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    out = [_conditions(job), ""]
    out += [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    out += [f"{row.name}: {row.error}" for row in results.rows if row.error]
    out += ["", f"ratio: the time over that of {results.base}; first 3: the time of the first three steps."]
    again = [f"{row.name} {row.again_s:.1f} s" for row in results.rows if row.again_s is not None]
    if again:
        out += [f"The first three in a second process, which finds what was compiled: {', '.join(again)}."]
    if results.waiting is not None:
        out += [f"Waiting for data: {results.waiting:.0%} of a step."]
    return "\n".join([*out, advice(results, remedy), ""])


def _to_json(job: "Job", results: "Results", remedy: str) -> dict[str, Any]:
    import attrs

    from steploop.tools.bench.rounds import advice

    rows = [
        attrs.asdict(row) | ({} if row.error else {"best_us": row.best_us, "ratio": row.ratio})
        for row in results.rows
    ]
    return {
        "recipe": str(Path(job.recipe)),
        "conditions": _conditions(job),
        "base": results.base,
        "waiting": results.waiting,
        "rows": rows,
        "advice": advice(results, remedy),
    }
