"""Check a recipe: build it small, and test it against every law that applies to it."""
