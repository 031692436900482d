"""Seeing runs: reading their directories, figures, the HTML report, drawings in the terminal."""
