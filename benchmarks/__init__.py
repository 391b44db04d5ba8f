"""Measures fastsam against what a user could write or call instead: `python -m benchmarks --help`."""
