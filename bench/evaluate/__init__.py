"""Accuracy on the user's own data: pictures (`images`), text-video retrieval (`retrieval`), video questions (`vqa`).

All keep to the same rules: what cannot be read is skipped, counted and named; an interrupted evaluation goes
on from its resume file; under `torchrun` every process takes its share and all get the whole result.
"""
