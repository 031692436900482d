"""steploop: a training epoch is ``functools.reduce(train_step, batches, state)``."""

__version__ = "0.1.0"
