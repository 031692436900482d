"""Data: batches as a pure function of (seed, epoch, position), augmentation, and small datasets."""

from typing import TYPE_CHECKING

from steploop.core.lazy import lazy_names

if TYPE_CHECKING:
    from steploop.data.augment import normalize as normalize
    from steploop.data.augment import random_crop as random_crop
    from steploop.data.augment import random_flip as random_flip
    from steploop.data.batches import Batches as Batches
    from steploop.data.batches import as_batches as as_batches
    from steploop.data.epochs import EpochBatches as EpochBatches
    from steploop.data.loader import Loader as Loader
    from steploop.data.order import batch_indices as batch_indices
    from steploop.data.order import batches_per_epoch as batches_per_epoch
    from steploop.data.order import epoch_order as epoch_order
    from steploop.data.sampling import bucketed_order as bucketed_order
    from steploop.data.sampling import weighted_order as weighted_order
    from steploop.data.sources.digits import DigitSource as DigitSource
    from steploop.data.sources.digits import load_digits as load_digits
    from steploop.data.sources.images import ImageData as ImageData
    from steploop.data.sources.images import ImageSource as ImageSource
    from steploop.data.sources.images import channel_statistics as channel_statistics
    from steploop.data.sources.images import load_images as load_images
    from steploop.data.sources.network import open_url as open_url
    from steploop.data.sources.shapes import SHAPE_CLASSES as SHAPE_CLASSES
    from steploop.data.sources.shapes import draw_shapes as draw_shapes
    from steploop.data.sources.text import library_files as library_files
    from steploop.data.sources.text import read_text as read_text
    from steploop.data.stream import Stream as Stream

# Public name -> the module it is defined in.
_HOMES = {
    "normalize": "augment",
    "random_crop": "augment",
    "random_flip": "augment",
    "Batches": "batches",
    "as_batches": "batches",
    "EpochBatches": "epochs",
    "Loader": "loader",
    "batch_indices": "order",
    "batches_per_epoch": "order",
    "epoch_order": "order",
    "bucketed_order": "sampling",
    "weighted_order": "sampling",
    "DigitSource": "sources.digits",
    "load_digits": "sources.digits",
    "ImageData": "sources.images",
    "ImageSource": "sources.images",
    "channel_statistics": "sources.images",
    "load_images": "sources.images",
    "open_url": "sources.network",
    "SHAPE_CLASSES": "sources.shapes",
    "draw_shapes": "sources.shapes",
    "library_files": "sources.text",
    "read_text": "sources.text",
    "Stream": "stream",
}
__all__ = [*_HOMES]  # noqa: PLE0604  (they are strings)

__getattr__, __dir__ = lazy_names(__name__, _HOMES, globals())
