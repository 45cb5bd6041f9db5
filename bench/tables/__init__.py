"""The paper's tables and figures, a file each, and what they share."""
