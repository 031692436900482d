"""Write checkpoints to storage: local files, the atomic commit, cleaning up after crashes."""
