"""Passes over captured graphs. They know graphs, nothing of schedules, command lines or models."""

PROJECT = "rs_compile"  # says whose `passes` this is: the name is a common one
