"""Analyses: residual branches, blocks, stages, protected tokens, padding."""
