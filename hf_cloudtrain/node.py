"""What happens on each node of a job, on every engine: data, checkpoint, mounts, command, signals, outcome."""
