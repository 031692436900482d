"""TrainState: the value, its parts, the machine that computes with it, and who owns its tensors."""
