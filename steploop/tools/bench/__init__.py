"""What a training loop costs on this machine: a recipe's step in several forms, side by side."""
