"""TODO room report."""
