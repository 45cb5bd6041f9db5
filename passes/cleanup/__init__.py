"""Spellings of one thing made one; what does nothing, dropped."""
