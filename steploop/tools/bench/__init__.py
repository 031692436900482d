"""Time a recipe's step in several forms on this machine."""
