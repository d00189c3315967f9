"""Benchmarks: the cost of the package, side by side with other clients. `make bench` runs all of them."""
