"""TODO room integrations."""
