"""TODO room verify."""
