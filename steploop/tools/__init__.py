"""The command line and what its commands use: reports, checks, benchmarks, replay, the LR finder."""
