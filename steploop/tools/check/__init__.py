"""Checking a recipe: built small, and put before every law of ``steploop.testing`` that applies to it."""
