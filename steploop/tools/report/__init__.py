"""Show runs: figures, the HTML report, drawings in the terminal."""
