"""Models that the benchmarks need and no library has."""
