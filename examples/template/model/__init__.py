"""The model of this project and its data."""
