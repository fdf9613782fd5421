"""Microbenchmarks, ``python -m fastfusion bench``; installs as ``fastfusion.benchmarks``."""
