"""The report of runs, live: served on loopback, fed by the files that a run writes."""
