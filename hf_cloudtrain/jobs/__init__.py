"""TODO room jobs."""
