"""TODO room preemption."""
