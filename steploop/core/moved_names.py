"""Keep the module paths of 0.1.0 importable, with a DeprecationWarning: saved recipes use them."""

import importlib
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

__all__ = ["install"]

# Path in 0.1.0 -> path now, both below "steploop."; what was below a moved package is below it still.
_MOVED = {
    "averaging": "core.steps.averaging",
    "batch_files": "checkpoint.format.batch_files",
    "capsule_files": "runs.capsules.capsule_files",
    "capsules": "runs.capsules.capsule_writer",
    "checks": "core.validators",
    "clip": "core.steps.clipping",
    "creation": "core.state.creation",
    "data.cifar10": "data.sources.cifar10",
    "data.counting": "data.dataset_size",
    "data.digits": "data.sources.digits",
    "data.fetching": "data.batch_requests",
    "data.folder": "data.sources.folder",
    "data.images": "data.sources.images",
    "data.network": "data.sources.network",
    "data.progress": "data.sources.progress",
    "data.shapes": "data.sources.shapes",
    "data.synthetic": "data.sources.synthetic",
    "data.text": "data.sources.text",
    "differentiation": "core.steps.backward_pass",
    "early_stopping": "core.early_stopping",
    "evaluation": "core.steps.evaluation",
    "extras": "core.extras",
    "folding": "core.steps.accumulation",
    "forwarding": "core.steps.forward_pass",
    "interruption": "core.interruption",
    "judging": "tools.replay.culprit",
    "layer_norms": "runs.layer_norms",
    "logs": "runs.logs",
    "lr_finding": "tools.lr_finder",
    "machine": "core.state.machine",
    "optim": "core.optimizer",
    "overrides": "recipe.config_values",
    "ownership": "core.state.ownership",
    "plateau": "core.plateau",
    "precision": "core.precision",
    "random_numbers": "core.seeds",
    "recipe_files": "recipe.recipe_files",
    "replacing": "core.atomic_files",
    "replaying": "tools.replay.capsule_replay",
    "reporting": "tools.report",
    "reporting.comparing": "tools.report.run_labels",
    "reporting.journals": "runs.journal_lines",
    "reporting.previews": "tools.report.schedule_previews",
    "reporting.reading": "runs.reading",
    "reporting.sources": "tools.report.source_html",
    "reporting.terminal": "tools.report.terminal_plots",
    "run_lock": "runs.directory_lock",
    "schedules": "core.schedules",
    "scheduling": "core.steps.set_rates",
    "sharing": "core.state.shared_memory",
    "shielding": "core.state.surroundings",
    "state": "core.state.train_state",
    "steps": "core.steps",
    "tensor_stats": "tools.replay.tensor_stats",
    "texts": "runs.text_names",
    "traced": "core.state.trace",
    "tracing": "tools.replay.module_watch",
    "trees": "core.trees",
    "updating": "core.steps.update",
}


def _new_path(name: str) -> str | None:
    """Return the new path of a module of 0.1.0; None if it has not moved."""
    old = name.removeprefix("steploop.")
    parent, _, last = old.rpartition(".")
    found = _MOVED.get(old) or (f"{_MOVED[parent]}.{last}" if parent in _MOVED else None)
    return found and f"steploop.{found}"


# without the classes of importlib.abc, which need a third of the time in which no signal is caught yet
class _MovedNames:
    """Finds a module under its old path: the same object as under the new one."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002  (the import system's signature)
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith("steploop.") or _new_path(fullname) is None:
            return None
        return importlib.machinery.ModuleSpec(fullname, self)  # type: ignore[arg-type]  # it has the methods of a Loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        """Leave it to the import system, as ``importlib.abc.Loader`` does."""

    def exec_module(self, module: ModuleType) -> None:
        new = _new_path(module.__name__)
        assert new is not None  # noqa: S101  (find_spec has looked)
        warnings.warn(f"{module.__name__} is now {new}.", DeprecationWarning, stacklevel=2)
        sys.modules[module.__name__] = importlib.import_module(new)


def install() -> None:
    """Install the finder of old paths in first place: a moved package would load its modules twice."""
    sys.meta_path.insert(0, _MovedNames())
