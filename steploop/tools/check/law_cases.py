"""List the laws that ``steploop check`` tests a recipe against, in order."""

from steploop.tools.check.cases import Case, Law, NotApplicable
from steploop.tools.check.data_cases import data_order, workers
from steploop.tools.check.evaluation_cases import evaluation_batch_size, evaluation_changes
from steploop.tools.check.step_cases import (
    deterministic,
    folds,
    learned,
    nan,
    pure_step,
    reached,
    resume,
    surroundings,
)

__all__ = ["LAWS", "Case", "Law", "NotApplicable"]

LAWS = (
    Law("the step is a pure function of (state, batch)", pure_step),
    Law("no surrounding of the call matters", surroundings),
    Law("a run can be cut anywhere", folds),
    Law("a resume in a new process is exact", resume, late=True),
    Law("a batch of nan changes nothing", nan),
    Law("every parameter gets a gradient", reached),
    Law("one batch can be learned by heart", learned, quick=False),
    Law("an evaluation changes nothing", evaluation_changes),
    Law("an evaluation does not depend on the batch size", evaluation_batch_size),
    Law("the batches are a function of (epoch, position)", data_order),
    Law("the batches do not depend on the workers", workers, quick=False),
    Law("every operation is deterministic", deterministic),
)
