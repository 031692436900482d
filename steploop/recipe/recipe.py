"""Recipe: what a recipe file gives to the run: the initial state, the step, the batches, the evaluation."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import attrs

from steploop.core.early_stopping import EarlyStopping, Mode
from steploop.core.html_tables import html_table
from steploop.core.plateau import ReduceLROnPlateau
from steploop.core.state.several import State
from steploop.core.steps.objectives import Objective
from steploop.data.batches import Batches, as_batches
from steploop.data.loader import Loader
from steploop.data.stream import Stream
from steploop.errors import ConfigError

__all__ = ["Batches", "Logger", "Recipe", "TrainStep", "checked_loggers"]

TrainStep = Callable[[Any, Any], Any]


class Logger(Protocol):
    """A function that takes named numbers at a step: ``lambda step, values: print(step, values)`` is one.

    It may also have these methods; each is called if it exists:

    - ``begin(directory)``, before anything else, with the run directory (a Path);
    - ``rewrite(rows)``, at a resume, with all the ``(step, values)`` that stand of what was logged before;
    - ``flush()``, before each checkpoint;
    - ``close()``, at the end.

    A logger that raises is reported once and left out; the run goes on.

    Example:
        >>> def show(step, values):
        ...     print(step, values)
        >>> recipe = Recipe(state=state, train_step=train_step, batches=loader, epochs=1, loggers=[show])
    """

    def __call__(self, step: int, values: Mapping[str, float], /) -> None:
        """Take the numbers of one step.

        Args:
            step: optimizer steps applied; in a later phase, with those of the phases before.
            values: name -> number; all are finite. Names with a slash (``eval/accuracy``) group as in TensorBoard.
        """


def checked_loggers(value: Any, owner: str = "Recipe") -> tuple[Any, ...]:
    """The loggers as a tuple; raises ConfigError for what is none."""
    if callable(value):
        raise ConfigError(
            f"{owner}: loggers must be a sequence of loggers, but is one ({value!r}). Write loggers=[...]."
        )
    try:
        found = tuple(value)
    except TypeError:
        found = (value,)
    for one in found:
        if not callable(one) or isinstance(one, type):
            what = "is a class: give an instance" if isinstance(one, type) else "cannot be called"
            raise ConfigError(
                f"{owner}: a logger is called as logger(step, values), but {one!r} {what}. "
                "A function will do: loggers=[lambda step, values: print(step, values)]."
            )
    return found


def _batches_note(kind: str, batches: Batches) -> tuple[str, ...]:
    """What a user should know of batches that were given as something else."""
    note = ""
    if isinstance(batches, Loader):
        note = (
            f"The {kind} became a Loader: the order of an epoch is a function of (seed, epoch), and the run can go on "
            "from any step."
        )
    elif isinstance(batches, Stream) and not batches.restorable:
        note = (
            f"The {kind} is read from its beginning: the run can go on from the end of an epoch, not from the middle of "
            "one. A Loader, or a Stream that is restorable, can."
        )
    return (note,) if note else ()


@attrs.frozen(kw_only=True)
class Recipe:
    """What ``build(config, device)`` of a recipe file returns.

    Attributes:
        state: the initial state; a resume loads its values from a checkpoint.
        train_step: ``(state, batch) -> state``, written out of the six functions.
        batches: the training data: a `Loader`, a `Stream`, or a torch ``DataLoader``, which `as_batches` turns into one.
        epochs: how many epochs to train.
        evaluate: ``state -> {metric: number or None}``, called after every epoch (or every ``eval_every_steps``). It is also called
            once before the first step, as a trial in which each ``steploop.evaluate`` and each ``Loader`` ends after one batch.
        monitor: the metric that decides about best checkpoint, early stopping and plateau; None: no best.
        mode: "min" where less of it is better.
        early_stopping: when to end early; its state travels in the TrainState.
        plateau: ReduceLROnPlateau on the monitored metric; its state travels in the TrainState, and ``train_step``
            reads ``state.plateau.learning_rate``.
        eval_every_steps: evaluate every so many attempted steps instead of at the end of each epoch.
        objective: of the (first) train step, for tools that look at a single step: check, lr-find, replay.
        samples_of: ``(batch, n) -> batch`` of its first n samples, for ``steploop check``. Needed where the samples are
            not the first axis of every tensor: time-first sequences, graphs, sparse tensors, lists of micro-batches.
        train_metrics: metrics computed from a training batch's outputs when a line is logged.
        data: one sentence that says what the data are; shown on the screen and recorded.
        notes: further sentences to show when the run begins, such as which precision was chosen and why.
        then: what follows when this recipe has finished: ``state -> Recipe`` of the next phase (a fold of its own).
        finish: called at the very end with the state and the run directory, to draw or print a sample.
        loggers: what gets the numbers of each log point and evaluation, in addition to metrics.jsonl; see `Logger`.
        compile: True, False or "auto": whether ``run`` compiles ``train_step`` by default.
        save_frozen: False leaves the parameters that are not trained out of checkpoints (a large model under LoRA): a resume
            takes them from ``state``, and refuses other values.

    Example:
        >>> recipe = Recipe(
        ...     state=state, train_step=train_step, batches=loader, epochs=3, objective=objective,
        ...     evaluate=lambda state: evaluate(state, batches, objective, {"accuracy": accuracy}),
        ...     monitor="accuracy", mode="max",
        ... )
    """

    state: State
    train_step: TrainStep
    batches: Batches
    epochs: int
    evaluate: Callable[[Any], Mapping[str, float | None]] | None = None
    monitor: str | None = None
    mode: Mode = "min"
    early_stopping: EarlyStopping | None = None
    plateau: ReduceLROnPlateau | None = None
    eval_every_steps: int | None = None
    objective: Objective | None = None
    samples_of: Callable[[Any, int], Any] | None = None
    train_metrics: Mapping[str, Callable[[Any, Any], tuple[Any, Any]]] = attrs.field(factory=dict)
    data: str = ""
    notes: tuple[str, ...] = ()
    then: "Callable[[Any], Recipe] | None" = None
    finish: Callable[[Any, Path], None] | None = None
    loggers: tuple[Logger, ...] = attrs.field(default=(), converter=checked_loggers)
    compile: bool | Literal["auto"] = False
    save_frozen: bool = True

    def __attrs_post_init__(self) -> None:
        states = self.state.values() if isinstance(self.state, Mapping) else (self.state,)
        batches = as_batches(self.batches, seed=getattr(next(iter(states), None), "seed", 0))
        if batches is not self.batches:
            note = _batches_note(type(self.batches).__name__, batches)
            object.__setattr__(self, "batches", batches)
            object.__setattr__(self, "notes", (*self.notes, *note))

    def _repr_html_(self) -> str:
        """What a notebook shows: what is trained, on what, and how long."""
        states = self.state.values() if isinstance(self.state, Mapping) else (self.state,)
        first = next(iter(states))
        rows = {
            "parameters": f"{sum(p.numel() for one in states for p in one.params.values()):,}",
            "precision": f"{first.precision} on {first.device}",
            "data": self.data,
            "training": f"{self.epochs} epochs of {len(self.batches):,} batches",
            "monitored": self.monitor and f"{self.monitor} ({self.mode})",
            "early stopping": self.early_stopping,
            "plateau": self.plateau,
            "compiled": self.compile or None,
        }
        return html_table("Recipe", rows)
