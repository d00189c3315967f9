"""TODO room trainer."""
