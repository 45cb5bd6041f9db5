"""A model into a graph of ATen ops."""
