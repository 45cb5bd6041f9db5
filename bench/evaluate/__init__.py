"""Accuracy on the user's own data: pictures (`images`) and text-video retrieval (`retrieval`).

Both keep to the same rules: what cannot be read is skipped, counted and named; an interrupted evaluation goes
on from its resume file; under `torchrun` every process takes its share and all get the whole result.
"""
