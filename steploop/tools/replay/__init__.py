"""Replay a capsule: take the step again and find the module that made a value that is not finite."""
