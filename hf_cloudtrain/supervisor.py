"""Watches over a job: starts its nodes, starts them again, and writes the record."""
