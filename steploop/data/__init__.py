"""Data: batches as a pure function of (seed, epoch, position), augmentation likewise, and small image datasets."""
