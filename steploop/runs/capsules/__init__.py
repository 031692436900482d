"""Capsules: a step that was not finite, saved with its batch for replay."""
