"""Run one recipe over many settings: a grid or a search, each member an ordinary run directory."""
