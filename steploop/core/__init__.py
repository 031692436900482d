"""One training step as functions of a value: the state, the steps, schedules, and small values."""
