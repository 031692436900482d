"""Data: batches as a pure function of (seed, epoch, position), augmentation likewise, and small image datasets.

``load_images`` is in ``steploop.data.images``, because it imports torchvision.
"""

from steploop.data.augment import normalize as normalize
from steploop.data.augment import random_crop as random_crop
from steploop.data.augment import random_flip as random_flip
from steploop.data.epochs import EpochBatches as EpochBatches
from steploop.data.loader import Loader as Loader
from steploop.data.order import batch_indices as batch_indices
from steploop.data.order import batches_per_epoch as batches_per_epoch
from steploop.data.order import epoch_order as epoch_order
from steploop.data.stream import Stream as Stream
