"""The places where tokens leave: score, select or merge, gather, restore."""
