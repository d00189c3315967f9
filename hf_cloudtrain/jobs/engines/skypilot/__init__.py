"""TODO room skypilot."""
