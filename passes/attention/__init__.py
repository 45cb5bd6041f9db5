"""Attention in its spellings, and which kernel it takes."""
