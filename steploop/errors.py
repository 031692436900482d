"""Every error steploop raises, as one tree.

SteploopError                     anything below; exit code 1
├── ConfigError (ValueError)      a hyperparameter or argument that is not legal; exit code 2
│   └── MissingExtraError (ImportError)   an optional dependency is not installed; names the extra
├── StepOrderError (RuntimeError) a step function was called before one that it needs
├── SpentStateError (RuntimeError) a state was used after its tensors were given away
├── ObjectiveError (TypeError)    an objective returned something that cannot be trained on
├── NonFiniteError (ArithmeticError)      too many steps in a row were not finite, or a parameter is not; exit code 5
├── OutOfMemoryError (MemoryError) a step did not fit; says the shapes of the batch
├── DataError (RuntimeError)      a dataset, worker or loader failed
│   └── EmptyDataError (ValueError)       there is nothing to train or evaluate on
├── CompileError (RuntimeError)   a train step cannot be captured as one graph
├── RankFailedError (RuntimeError) another rank of the run failed, died or hangs; exit code 7
├── RunLockedError (RuntimeError) another process owns the run directory; exit code 6
├── RunExistsError (FileExistsError)      the run directory holds a run already; exit code 2
└── CheckpointError (RuntimeError) exit code 3
    ├── CheckpointDamagedError    bytes are missing, changed or hostile
    ├── CheckpointIncompatibleError       it does not fit the state that it is loaded into
    ├── CheckpointVersionError    its format is newer or older than this version reads
    ├── CheckpointUnsupportedError (TypeError)     the state holds a value that no checkpoint can hold
    └── CheckpointWriteError (OSError)    it could not be written; has ``errno``; exit code 4

Each message says what was expected, what came, and what to do.
"""

from typing import Any, ClassVar


class SteploopError(Exception):
    """Any error of steploop; catch this to catch all of them.

    Example:
        >>> try:
        ...     constant(-0.1)
        ... except SteploopError as error:
        ...     print(error.exit_code)
        2
    """

    exit_code: ClassVar[int] = 1


class ConfigError(SteploopError, ValueError):
    """A hyperparameter or an argument is not legal.

    Example:
        >>> constant(-0.1)
        Traceback (most recent call last):
        ...
        steploop.errors.ConfigError: ...
    """

    exit_code: ClassVar[int] = 2


class MissingExtraError(ConfigError, ImportError):
    """An optional dependency is not installed."""


class StepOrderError(SteploopError, RuntimeError):
    """A step function was called before one that it needs."""


class SpentStateError(SteploopError, RuntimeError):
    """A state was used after it gave its tensors to the next one."""


class ObjectiveError(SteploopError, TypeError):
    """An objective returned something that cannot be trained on.

    Example:
        >>> forward_loss(state, batch, lambda model, batch: "a loss")
        Traceback (most recent call last):
        ...
        steploop.errors.ObjectiveError: ...
    """


class NonFiniteError(SteploopError, ArithmeticError):
    """Too many steps in a row were not finite, or a parameter to be saved is not.

    Attributes:
        state: after the last of those steps, with the parameters of the last finite one; None where a save was refused.
    """

    exit_code: ClassVar[int] = 5

    def __init__(self, *said: object, state: Any = None) -> None:
        super().__init__(*said)
        self.state = state


class OutOfMemoryError(SteploopError, MemoryError):
    """A step did not fit into memory; the state that went in is intact."""


class DataError(SteploopError, RuntimeError):
    """A dataset, a worker process or a loader failed.

    Example:
        >>> Stream(lambda epoch, start: [1, 2], length=2).epoch(0, start=1)
        Traceback (most recent call last):
        ...
        steploop.errors.DataError: ...
    """


class EmptyDataError(DataError, ValueError):
    """There is nothing to train or evaluate on.

    Example:
        >>> Loader(torch.empty(0, 4), batch_size=2, seed=0)
        Traceback (most recent call last):
        ...
        steploop.errors.EmptyDataError: ...
    """


class CompileError(SteploopError, RuntimeError):
    """A train step cannot be captured as one graph."""


class RankFailedError(SteploopError, RuntimeError):
    """Another rank of the run failed, died or hangs; this one ends with it.

    Attributes:
        said: whether another rank says so already.
    """

    exit_code: ClassVar[int] = 7

    def __init__(self, message: str, *, said: bool = False) -> None:
        super().__init__(message)
        self.said = said


class RunLockedError(SteploopError, RuntimeError):
    """Another process owns the run directory."""

    exit_code: ClassVar[int] = 6


class RunExistsError(SteploopError, FileExistsError):
    """The run directory holds a run already."""

    exit_code: ClassVar[int] = 2


class CheckpointError(SteploopError, RuntimeError):
    """A checkpoint cannot be used."""

    exit_code: ClassVar[int] = 3


class CheckpointDamagedError(CheckpointError):
    """Bytes of the checkpoint are missing, changed or hostile."""


class CheckpointIncompatibleError(CheckpointError):
    """The checkpoint does not fit the state that it is loaded into."""


class CheckpointVersionError(CheckpointError):
    """This version does not read the checkpoint's format."""


class CheckpointUnsupportedError(CheckpointError, TypeError):
    """The state holds a value that a checkpoint cannot hold; nothing was written."""


class CheckpointWriteError(CheckpointError, OSError):
    """The checkpoint could not be written."""

    exit_code: ClassVar[int] = 4
