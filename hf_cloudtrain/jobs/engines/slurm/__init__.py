"""TODO room slurm."""
