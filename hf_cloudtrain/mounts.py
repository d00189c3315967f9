"""Folders at the paths where a job expects them."""
