"""Optuna's part of a search: its study, what it proposes next, and when a run is pruned.

A proposal is a function of (search seed, trials so far): the sampler is made anew for each, so that a search that was
killed and goes on proposes what it would have proposed.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from steploop.core.extras import import_extra
from steploop.core.seeds import fold_in
from steploop.errors import ConfigError, DataError
from steploop.recipe.config_values import configure
from steploop.recipe.recipe_files import RecipeFile
from steploop.runs.directory_reader import refuse_irregular
from steploop.tools.sweep.search_space import Choices, Setting, read_space
from steploop.tools.sweep.sweep_record import SweepRecord

if TYPE_CHECKING:
    import optuna

__all__ = ["add_trial", "metric_of", "open_study", "propose", "settings_of"]

_NAME = "steploop"
_WORKER = "worker"
_NONCE = "nonce"


def _optuna() -> Any:
    found = import_extra("optuna", extra="optuna", purpose="A search")
    import_extra("sqlalchemy", extra="optuna", purpose="The storage of a search")
    found.logging.set_verbosity(logging.WARNING)  # its lines about each trial would tear the table
    return found


def metric_of(file: RecipeFile, given: Mapping[str, Any]) -> tuple[str, str]:
    """The metric that a recipe monitors, and its mode: builds the recipe once, on the CPU.

    Raises:
        ConfigError: it monitors nothing, or a setting does not fit.
        MissingExtraError: Optuna is not installed.
    """
    _optuna()
    space = read_space(file.config_class, given, where=file.name)
    first = {name: s.values[0] if isinstance(s, Choices) else s.low for name, s in space.items()}
    recipe = file.build(configure(file.config_class, first, where=file.name), torch.device("cpu"))
    if recipe.monitor is None:
        raise ConfigError(
            f"{file.name} monitors no metric, and a search needs one. Give its Recipe monitor='accuracy', mode='max', say."
        )
    return recipe.monitor, recipe.mode


def _url(sweep: SweepRecord) -> str:
    if sweep.storage is not None:
        return sweep.storage
    from sqlalchemy.engine import URL

    try:
        refuse_irregular(sweep.path, ["study.db"])
    except DataError as error:
        raise ConfigError(str(error)) from error
    url = URL.create("sqlite", database=os.path.abspath(sweep.path / "study.db"))  # noqa: PTH100  (links stay as they are)
    return url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")  # it is a template


@contextmanager
def open_study(sweep: SweepRecord) -> Iterator["optuna.Study"]:
    """The study of a sweep; it is made if there is none.

    Raises:
        ConfigError: the storage cannot be opened.
        MissingExtraError: Optuna is not installed.
    """
    optuna = _optuna()
    assert sweep.metric is not None  # noqa: S101  (``sweep_plan`` asks the recipe)
    pruner = optuna.pruners.MedianPruner() if sweep.prune else optuna.pruners.NopPruner()
    try:
        # SQLite has one writer at a time; the others wait, in seconds
        patience = {"connect_args": {"timeout": 60}} if sweep.storage is None else None
        storage = optuna.storages.RDBStorage(_url(sweep), engine_kwargs=patience)
        study = optuna.create_study(
            storage=storage, study_name=_study_name(sweep), load_if_exists=True, pruner=pruner,
            direction="minimize" if sweep.metric[1] == "min" else "maximize",
        )  # fmt: skip
    except ConfigError:
        raise
    except Exception as error:  # (sqlalchemy's, or the database driver's)
        raise ConfigError(
            f"The storage of the search cannot be opened: {error}. Choose another --storage."
        ) from error
    try:
        yield study
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _study_name(sweep: SweepRecord) -> str:
    """A shared storage may hold the studies of several sweeps."""
    return _NAME if sweep.storage is None else f"{_NAME}:{os.path.abspath(sweep.path)}"  # noqa: PTH100  (as above)


def _distributions(space: Mapping[str, Setting]) -> dict[str, Any]:
    found = _optuna().distributions

    def one(setting: Setting) -> Any:
        if isinstance(setting, Choices):
            return found.CategoricalDistribution([_choice(value) for value in setting.values])
        if setting.whole:
            return found.IntDistribution(int(setting.low), int(setting.high), log=setting.log)
        return found.FloatDistribution(setting.low, setting.high, log=setting.log)

    return {name: one(setting) for name, setting in space.items()}


def _choice(value: Any) -> Any:
    """A value as Optuna's databases keep it: lists and objects as their JSON."""
    return json.dumps(value) if isinstance(value, (list, dict)) else value


def settings_of(space: Mapping[str, Setting], params: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a Config from the parameters of a trial.

    Raises:
        DataError: the trial has other parameters than the sweep.
    """
    if params.keys() != space.keys():
        raise DataError(
            f"The trial has the parameters {sorted(params)}, but the sweep varies {sorted(space)}. Its storage was changed, or "
            "is another sweep's."
        )
    found = {}
    for name, setting in space.items():
        value = params[name]
        if isinstance(setting, Choices):
            value = next((one for one in setting.values if _choice(one) == value), value)
        found[name] = value
    return found


def propose(sweep: SweepRecord, trials: list["optuna.trial.FrozenTrial"], *, salt: int = 0) -> dict[str, Any]:
    """The parameters of the next trial: a function of the search's seed, the trials so far, and the salt.

    Args:
        sweep: whose.
        trials: all trials so far.
        salt: tells processes that propose at the same time from each other; 0 for the only one.
    """
    optuna = _optuna()
    assert sweep.metric is not None  # noqa: S101  (as above)
    seed = fold_in(fold_in(sweep.search_seed, len(trials)), salt) % (1 << 32)
    memory = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=seed),
        direction="minimize" if sweep.metric[1] == "min" else "maximize",
    )
    memory.add_trials(trials)
    params: dict[str, Any] = memory.ask(_distributions(sweep.space)).params
    return params


def add_trial(
    sweep: SweepRecord, study: "optuna.Study", params: Mapping[str, Any], *, worker: str, nonce: str
) -> int:
    """Add a trial that runs, whole in one transaction: a kill leaves it out or leaves it with all its parameters.

    Returns:
        Its number.
    """
    optuna = _optuna()
    study.add_trial(
        optuna.trial.create_trial(
            state=optuna.trial.TrialState.RUNNING, params=dict(params), distributions=_distributions(sweep.space),
            user_attrs={_WORKER: worker, _NONCE: nonce},
        )
    )  # fmt: skip
    return next(t.number for t in study.get_trials(deepcopy=False) if t.user_attrs.get(_NONCE) == nonce)
