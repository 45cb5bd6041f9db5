"""`python -m bench gpu`: everything that is claimed about GPUs, measured by one command."""
