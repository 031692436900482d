"""A Logger that writes TensorBoard event files."""

from collections.abc import Mapping
from pathlib import Path

from steploop.errors import MissingExtraError

__all__ = ["TensorBoard"]


class TensorBoard:
    """Scalars for ``tensorboard --logdir``.

    Args:
        directory: where the event files go; they are added to those that are there.

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
        self._writer = SummaryWriter(str(directory))

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to the curve of each name."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write out the last points."""
        self._writer.close()
