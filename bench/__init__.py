"""Benchmarks and training scripts, run from a checkout: `python -m bench.<name>`."""
