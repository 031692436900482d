"""The Logger interface, and several loggers as one: a logger that fails is reported once and left out, the run goes on."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

__all__ = ["Logger", "Loggers"]


class Logger(Protocol):
    """Whatever takes named numbers at a step: a function with a ``close()``.

    It may have a ``rewrite(rows)`` besides, which is called at a resume with all the (step, values) that stand.
    """

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        """Take the numbers of one step.

        Args:
            step: optimizer steps applied.
            values: name -> number; all are finite. Names with a slash (``eval/accuracy``) group as in TensorBoard.
        """

    def close(self) -> None:
        """Write out what is held back; nothing is logged afterwards."""


class Loggers:
    """Several loggers as one, which never raises.

    Args:
        loggers: each is called with every line, in this order.
        report: told, once for each logger that fails, in one sentence.
    """

    def __init__(self, loggers: Sequence[Logger], report: Callable[[str], None]) -> None:
        self._loggers = list(loggers)
        self._report = report

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        """Pass the numbers on."""
        for logger in tuple(self._loggers):
            try:
                logger(step, values)
            except Exception as error:  # noqa: BLE001  (a full disk or a lost server must not cost the training)
                self._fail(logger, error)

    def rewrite(self, rows: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """Tell those that can what stands of all that was logged before: a resume takes some steps again."""
        kept = list(rows)
        for logger in tuple(self._loggers):
            try:
                if (rewrite := getattr(logger, "rewrite", None)) is not None:
                    rewrite(kept)
            except Exception as error:  # noqa: BLE001  (likewise)
                self._fail(logger, error)

    def close(self) -> None:
        """Close all of them."""
        for logger in tuple(self._loggers):
            try:
                logger.close()
            except Exception as error:  # noqa: BLE001  (likewise)
                self._fail(logger, error)

    def _fail(self, logger: Logger, error: Exception) -> None:
        self._loggers.remove(logger)
        name = getattr(logger, "__name__", type(logger).__name__)
        self._report(
            f"The logger {name} failed and is left out from here on: {type(error).__name__}: {error}"
        )
