"""The run: the outer loop over a recipe, its directory, its signals and what it records."""
