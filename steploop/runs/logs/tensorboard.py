"""A Logger that writes TensorBoard event files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steploop.errors import MissingExtraError

__all__ = ["TensorBoard"]


class TensorBoard:
    """Scalars for ``tensorboard --logdir``.

    Args:
        directory: where the event files go; they are added to those that are there, and ``rewrite`` tells TensorBoard
            to forget the points of steps that are taken again.

    Raises:
        MissingExtraError: tensorboard is not installed.
    """

    def __init__(self, directory: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError(
                "TensorBoard is not installed: pip install 'steploop[tensorboard]'."
            ) from error
        self._directory = directory
        self._make = SummaryWriter
        self._writer: Any = None

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to the curve of each name."""
        if self._writer is None:
            self._writer = self._make(str(self._directory))
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def rewrite(self, rows: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Begin a file that makes TensorBoard drop all points from the last step of ``rows`` on, and adds those again."""
        if any(self._directory.glob("events.out.tfevents.*")):
            last = rows[-1][0] if rows else 0
            self._writer = self._make(str(self._directory), purge_step=last)
        else:  # it was asked for at the resume only
            last = 0
        for step, values in rows:
            if step >= last:
                self(step, values)

    def flush(self) -> None:
        """Write out the points so far."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Write out the last points."""
        if self._writer is not None:
            self._writer.close()
