"""Recipes that ``steploop bench`` knows by name: those of ``steploop docs speed``."""
