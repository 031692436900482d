"""Steps over batches that come in parts, on one process or on several ranks; nothing here is read for a whole batch."""
