"""Training with timm's parts: a recipe, a loop that can be interrupted, and the data."""
