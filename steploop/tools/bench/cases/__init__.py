"""Recipes of which ``steploop bench`` knows the names: the yardsticks of the README."""
