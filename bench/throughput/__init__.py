"""`python -m bench throughput`: how fast models run, pruned and not, beside what their arithmetic allows."""
