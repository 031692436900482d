"""Go on with a run: apply what it is given anew, or refuse it, before anything is written."""

import socket
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import attrs

from steploop.checkpoint import CheckpointStore, digest
from steploop.core.state.several import State, members
from steploop.errors import CheckpointDamagedError, CheckpointIncompatibleError, ConfigError
from steploop.recipe.config_values import configure
from steploop.recipe.recipe import Recipe
from steploop.runs.anew import with_folds, with_hyperparameters, with_loss_scales
from steploop.runs.beginning import Beginning, Note, begin
from steploop.runs.contract import Change, phase_record, refuse_inexact, sentence
from steploop.runs.data_changes import VALUES, begins_anew, changed_data, changed_order
from steploop.runs.environment import versions
from steploop.runs.initial_weights import with_initial_weights
from steploop.runs.members import arranged, at_position, attempted_steps, lead
from steploop.runs.monitoring import ending_of, prepared
from steploop.runs.recorded_phases import recorded_phase
from steploop.runs.requests import Request
from steploop.runs.safe_text import safe_text
from steploop.runs.trial_evaluation import try_evaluation

__all__ = ["begin_again"]


def begin_again(request: Request, status: Mapping[str, Any], note: Note) -> Beginning:
    """Go on with a run from its newest checkpoint; what is given anew is applied, or refused by name.

    Args:
        request: the resume.
        status: what status.json says.
        note: told what is not as it was, and what becomes of it.

    Raises:
        ConfigError: something that is given anew cannot be applied.
        DataError: the data are others, or cannot be gone on with where the run stands.
        CheckpointError: no checkpoint is whole, or none fits; or ``require_exact``, and something is not as it was.
    """
    if request.require_exact:
        refuse_inexact(request.changes)
    recipe, phase = _phase_of(request, request.build())
    order = request.recorded.get("states")
    if (
        isinstance(order, list)
        and isinstance(recipe.state, Mapping)
        and {*map(str, order)} == {*recipe.state}
    ):
        recipe = attrs.evolve(recipe, state=arranged(recipe.state, tuple(map(str, order))))
    return _Resumption(request, recipe, phase, status, note).begin()


def _phase_of(request: Request, recipe: Recipe) -> tuple[Recipe, int]:
    """The last phase that was begun. Only its form counts: the values come from a checkpoint."""
    phase = 0
    while recipe.then is not None and any(request.directory.checkpoints(phase + 1).glob("step-*")):
        recipe, phase = recipe.then(recipe.state), phase + 1
    return recipe, phase


class _Resumption:
    """The parts of a resume until it goes on."""

    def __init__(
        self, request: Request, recipe: Recipe, phase: int, status: Mapping[str, Any], note: Note
    ) -> None:
        self._request, self._recipe, self._phase, self._status, self._note = (
            request,
            recipe,
            phase,
            status,
            note,
        )
        self._now = phase_record(recipe)
        self._before = self._recorded_phase()
        # whatever a setting or a line of code may decide
        self._anew = [c for c in request.changes if c.kind in {"setting", "recipe", "module"}]

    def begin(self) -> Beginning:
        request, recipe, note = self._request, self._recipe, self._note
        if request.changes:
            note(f"given anew: {sentence(request.changes)}")
        load = partial(self._load, prepared(recipe, recipe.state))
        state = load()
        if state is None:  # it was ended before its first checkpoint, and begins anew
            if request.require_exact:
                refuse_inexact(request.changes)
            self._refuse_lost_checkpoints()
            if self._phase == 0 and request.init is not None:
                recipe = with_initial_weights(recipe, request.init, note)
            return attrs.evolve(begin(recipe, phase=self._phase), changes=request.changes)
        due = self._status.get("evaluation_due")
        owed = due is not None and due == digest(state)
        self._refuse(state)
        restart, changes = self._compare(state)
        if request.require_exact:
            refuse_inexact(changes)
        if self._phase == 0 and any(change.kind == "setting" for change in self._anew):
            self._refuse_other_weights(state)

        def settled() -> State:
            found = load()
            assert found is not None  # noqa: S101  (it was there a moment ago)
            return with_folds(recipe, found, self._before, lambda _: None)

        started = self._before.get("start", {})
        # a resume before this one may have been ended before its changes were saved
        anew = any(
            change.kind not in {"compile", "ranks", "vectorised"} for change in changes
        ) or self._before.get("unsaved", False)
        if anew:
            with_folds(recipe, state, self._before, note)
            del state  # two are enough at a time
            state = with_hyperparameters(recipe, settled, started, self._now["start"], note)
            state = with_loss_scales(recipe, state, started, note)
        weights = try_evaluation(recipe, state) if anew else None
        if restart or self._is_whole(lead(state).batch):
            state = at_position(state, 0 if restart else len(recipe.batches))
        ended = not owed and recipe.then is None and self._has_ended(state)
        return Beginning(
            recipe=attrs.evolve(recipe, state=state), phase=self._phase, loaded=True, record=self._now,
            changes=(*changes,), weights=weights, owed=owed, before=self._before, unsaved=anew, ended=ended,
        )  # fmt: skip

    def _refuse_lost_checkpoints(self) -> None:
        """Refuse to begin anew what was trained already; its log would be written over too."""
        if (named := self._status.get("checkpoint")) is not None:
            place = self._request.directory.checkpoints(self._phase)
            raise CheckpointDamagedError(
                f"status.json names the checkpoint {safe_text(named)}, but {place} holds none. Put the checkpoints back where "
                "they were, or begin a new run in another directory."
            )

    def _recorded_phase(self) -> Mapping[str, Any]:
        """The record of the phase; of a run of version 0.1.0, what is known without one."""
        recorded = self._request.recorded
        if (found := recorded_phase(recorded, self._phase)) or self._phase:
            return found
        before: dict[str, Any] = {"data": {"note": recorded.get("data")}}
        if any(change.kind == "setting" for change in self._request.changes):
            before["start"] = phase_record(self._built_as_recorded())["start"]
        return before

    def _built_as_recorded(self) -> Recipe:
        """The recipe with the Config of before, as far as it has its fields."""
        request = self._request
        config = configure(request.recipe.config_class, request.known_settings, where=request.recipe.name)
        return request.recipe.build(config, request.device)

    def _load(self, like: State) -> State | None:
        store = CheckpointStore(self._request.directory.checkpoints(self._phase))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                return store.load(like=like, require_exact=self._request.require_exact)
            except CheckpointIncompatibleError as error:
                if not self._anew:
                    raise
                raise CheckpointIncompatibleError(
                    f"{error}\nThis resume was given anew: {sentence(self._anew)}. Leave it as it was; or begin a new run from "
                    "the run's weights: steploop run RECIPE --init RUN."
                ) from error
            finally:
                for warning in caught:
                    self._note(f"warning: {warning.message}")

    def _compare(self, state: State) -> tuple[bool, list[Change]]:
        """Whether the epoch begins anew, and all that is not as it was."""
        before, now, request = self._before, self._now, self._request
        data = changed_data(before.get("data", {}), now["data"], note_counts=self._note_counts())
        if any(c.name == VALUES for c in data) and not self._data_are_reproducible():
            data = [c for c in data if c.name != VALUES]
            self._note(
                "warning: the recipe's data are not the same each time it is built: no resume of it is exact"
            )
        order = changed_order(before.get("batches", {}), now["batches"])
        first = lead(state)
        anew = begins_anew(
            data, order, epoch=first.epoch, batch=0 if self._is_whole(first.batch) else first.batch,
            restorable=now["restorable"], requested=request.restart_epoch, note=self._note,
        )  # fmt: skip
        restarts = [Change("epoch", f"batch {first.batch}", "batch 0", "epoch")] if anew else []
        return anew, [*request.changes, *data, *order, *restarts]

    def _is_whole(self, batch: int) -> bool:
        """Whether an epoch is whole whose cursor is at ``batch``: all that is left of it is its evaluation."""
        per_epoch: int = self._before.get("batches", {}).get("per_epoch", len(self._recipe.batches))
        return batch >= per_epoch

    def _note_counts(self) -> bool:
        """Whether another sentence about the data means other data.

        Another version may word it otherwise; and where their values are the same, what is given anew may have done so.
        """
        now = versions()["steploop"]
        reworded = any(change.kind in {"recipe", "setting"} for change in self._request.changes)
        content = self._now["data"]["content"]
        same = content is not None and content == self._before.get("data", {}).get("content")
        return self._request.recorded.get("steploop") == now and not (reworded and same)

    def _data_are_reproducible(self) -> bool:
        """Whether building once more gives the same data, on the machine that the run was on last."""
        if self._status.get("host") != socket.gethostname():
            return False
        again = phase_record(_phase_of(self._request, self._request.build())[0])
        return bool(again["data"]["content"] == self._now["data"]["content"])

    def _refuse(self, state: State) -> None:
        """Refuse what a state carries on and no setting can change: its seed, and the epochs that it has."""
        for name, one in members(state).items():
            if (seed := self._now["start"][name]["seed"]) != one.seed:
                of = f" of {name}" if name else ""
                raise ConfigError(
                    f"The seed{of} is {one.seed} in the checkpoint, and {seed} is given. It decides the order of the data and all "
                    "random numbers, so a resume keeps it. Leave it as it was, or begin a new run: steploop run RECIPE "
                    "--init RUN."
                )
        first, epochs = lead(state), self._recipe.epochs
        begun = first.epoch + (first.batch > 0)
        if epochs < begun and self._anew:
            raise ConfigError(
                f"epochs={epochs}, but the run is in its epoch {begun} already. Give at least {begun}, or leave it out."
            )

    def _refuse_other_weights(self, state: State) -> None:
        """Settings that decide the first weights have no effect on a resume."""
        recorded = self._before.get("start", {})
        weights = {name: one["weights"] for name, one in self._now["start"].items()}
        if attempted_steps(state) == 0 or not recorded:
            return
        if weights == {name: one.get("weights") for name, one in recorded.items()}:
            return

        def built(recipe: Recipe) -> dict[str, str]:
            return {name: one["weights"] for name, one in phase_record(recipe)["start"].items()}

        # another machine may begin with other bits, and a recipe without a seed always does: the settings are to blame
        # if they make a difference here and now
        if built(self._built_as_recorded()) != weights and built(self._request.build()) == weights:
            settings = [c for c in self._anew if c.kind == "setting"]
            raise ConfigError(
                f"{sentence(settings)}: this changes the weights that a run begins with, and a resume takes its weights from "
                "the checkpoint. Leave it as it was, or begin a new run."
            )

    def _has_ended(self, state: State) -> bool:
        """Whether nothing is left to train; says why, and refuses what would then be recorded and never happen."""
        ending = ending_of(self._recipe, state, self._request.plan.limit_steps)
        if ending is None:
            return False
        epochs, setting = self._recipe.epochs, self._setting("epochs")
        why = f"nothing is left to do: the run has its {epochs} epochs. To go on, give more, as in --set {setting}={2 * epochs or 1}"
        if ending == "early_stop":
            why = self._why_stopped(state)
        elif ending == "limit":
            why = f"nothing is left to do: the run has reached --limit-steps {self._request.plan.limit_steps}"
        if given := [c for c in self._anew if c.kind != "module"]:
            raise ConfigError(f"{sentence(given)} would change nothing: {why}.")
        self._note(why)
        return True

    def _why_stopped(self, state: State) -> str:
        fold, rule = lead(state).early_stopping, self._recipe.early_stopping
        assert fold is not None  # noqa: S101  (it has stopped the run)
        assert rule is not None  # noqa: S101  (a fold without a rule is dropped)
        return (
            f"early stopping has ended this run: {rule.monitor} did not improve in {fold.bad_checks} evaluations (patience "
            f"{rule.patience}). It stays stopped; to go on, give more patience, as in --set {self._setting('patience')}={2 * fold.bad_checks}"
        )

    def _setting(self, part: str) -> str:
        """The recipe's setting that has this in its name."""
        names = self._request.settings
        return part if part in names else next((name for name in names if part in name), "NAME")
