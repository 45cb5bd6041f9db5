"""What one device wants written otherwise."""
