"""Calls several loggers as one; a logger that fails is reported once and left out."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from steploop.recipe.recipe import Logger

__all__ = ["Logger", "Loggers"]


class Loggers:
    """Several loggers as one, which never raises.

    Args:
        loggers: each is called with every line, in this order.
        report: called once for each logger that fails, with one sentence.
    """

    def __init__(self, loggers: Sequence[Logger], report: Callable[[str], None]) -> None:
        self._loggers = list(loggers)
        self._given = list(loggers)
        self._report = report

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        """Pass the numbers on."""
        for logger in tuple(self._loggers):
            try:
                logger(step, values)
            except Exception as error:  # noqa: BLE001  (a full disk or a lost server must not cost the training)
                self._fail(logger, error)

    def begin(self, directory: Path) -> None:
        """Tell those that want to know where the run's files are."""
        self._ask("begin", directory)

    def add(self, loggers: Iterable[Logger], directory: Path) -> None:
        """Add those that are not among them yet: a later phase of a recipe may bring some of its own."""
        known = {id(logger) for logger in self._given}
        new = [logger for logger in loggers if id(logger) not in known]
        self._given += new
        entered = Loggers(new, self._report)
        entered.begin(directory)
        self._loggers += entered._loggers

    def rewrite(self, rows: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """Tell those that can what stands of all that was logged before: a resume takes some steps again."""
        kept = list(rows)
        self._ask("rewrite", kept)

    def flush(self) -> None:
        """Let those that hold something back write it: a checkpoint follows."""
        self._ask("flush")

    def close(self) -> None:
        """Close all of them."""
        self._ask("close")

    def _ask(self, method: str, *arguments: Any) -> None:
        """Call a method of each logger that has it."""
        for logger in tuple(self._loggers):
            try:
                if (found := getattr(logger, method, None)) is not None:
                    found(*arguments)
            except Exception as error:  # noqa: BLE001  (as above)
                self._fail(logger, error)

    def _fail(self, logger: Logger, error: Exception) -> None:
        self._loggers.remove(logger)
        name = getattr(logger, "__name__", type(logger).__name__)
        self._report(
            f"The logger {name} failed and is left out from here on: {type(error).__name__}: {error}"
        )
