"""The engine `slurm`: a cluster that already exists, by Slurm's own commands.

    engine.py       SlurmEngine: what `check`, `submit`, `look`, `cancel` and `lines` do; the batch script
    client.py       sbatch, scontrol, squeue, scancel: how they are called, and what `scontrol show job` says
    batch_main.py   what the batch script runs: the supervisor, and whether Slurm queues the job again
    gang.py         the nodes: one srun, one task per node

    job run -> sbatch -> batch_main (supervisor, on the first node) -> srun -> jobs/node/node.py on each node -> bash

The submitter writes the job's record until sbatch has the job; then the supervisor does. Where the supervisor cannot
(before it runs, and after Slurm has killed it), `look` asks Slurm.
"""
