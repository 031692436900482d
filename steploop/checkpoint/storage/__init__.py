"""Where checkpoints are written: local files, the atomic commit, and cleaning up after crashes."""
