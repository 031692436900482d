"""One training step as functions of a value: the state, the six steps, schedules, and the small values they use."""
