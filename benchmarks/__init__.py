"""What the package costs, side by side with what it could be built on. `make bench` runs all of it."""
