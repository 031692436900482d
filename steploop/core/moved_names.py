"""The module paths of 0.1.0, kept importable with a DeprecationWarning: saved recipes import them."""

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

__all__ = ["MovedNames", "install"]

# Path in 0.1.0 -> path now, both below "steploop.".
_MOVED = {
    "averaging": "core.steps.averaging",
    "checks": "core.validators",
    "clip": "core.steps.clipping",
    "data.cifar10": "data.sources.cifar10",
    "data.digits": "data.sources.digits",
    "data.folder": "data.sources.folder",
    "data.images": "data.sources.images",
    "data.network": "data.sources.network",
    "data.shapes": "data.sources.shapes",
    "data.synthetic": "data.sources.synthetic",
    "data.text": "data.sources.text",
    "early_stopping": "core.early_stopping",
    "evaluation": "core.steps.evaluation",
    "extras": "core.extras",
    "folding": "core.steps.accumulation",
    "forwarding": "core.steps.forward_pass",
    "machine": "core.state.machine",
    "optim": "core.optimizer",
    "ownership": "core.state.ownership",
    "plateau": "core.plateau",
    "precision": "core.precision",
    "random_numbers": "core.seeds",
    "reporting": "runs",
    "reporting.reading": "runs.reading",
    "schedules": "core.schedules",
    "schedules.cycles": "core.schedules.cycles",
    "schedules.decays": "core.schedules.decays",
    "schedules.rates": "core.schedules.rates",
    "schedules.tables": "core.schedules.tables",
    "schedules.warmups": "core.schedules.warmups",
    "scheduling": "core.steps.set_rates",
    "state": "core.state.train_state",
    "steps": "core.steps",
    "trees": "core.trees",
    "updating": "core.steps.update",
}


class MovedNames(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a moved module under its old path; asked last, so it costs nothing for modules that exist."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002  (the import system's signature)
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> importlib.machinery.ModuleSpec | None:
        """Answer for the old paths alone."""
        if fullname.removeprefix("steploop.") not in _MOVED:
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """Give the module under its new path, and say what that is."""
        new = "steploop." + _MOVED[spec.name.removeprefix("steploop.")]
        warnings.warn(f"{spec.name} is now {new}.", DeprecationWarning, stacklevel=2)
        source, module = importlib.import_module(new), ModuleType(spec.name)
        module.__path__ = []  # a module below it is looked up here again
        module.__dict__.update(
            {name: getattr(source, name) for name in dir(source) if not name.startswith("__")}
        )
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is left to run."""


def install() -> None:
    """Let the old paths be found."""
    sys.meta_path.append(MovedNames())
