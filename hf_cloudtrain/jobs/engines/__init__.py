"""The engines: what starts the processes of a job.

    protocol.py   Engine (check, show, submit, look, cancel, lines), EngineStatus, and the table of engines
    local.py      this machine: one process a node
    slurm/        a Slurm cluster, by its own commands
    skypilot/     machines of clouds, by the command `sky`
    sagemaker/    training jobs of Amazon SageMaker, by boto3

Every engine starts the same node (jobs/node/node.py) on each machine. What differs is what brings it there, and who
writes the job's record after `submit`:

    engine      submit starts              that starts                 the record is written by
    local       local.py, in a session     a node a process            the supervisor (jobs/supervisor.py)
    slurm       sbatch -> batch_main.py    srun -> a node a machine    the supervisor, in the batch script
    skypilot    sky -> node_main.py        the node, in its process    `look`, from what SkyPilot says
    sagemaker   boto3 -> container_main    node_main.py a container    the supervisor, in the first container

The engines import the rooms below them (supervisor, gang, node, records, logs, spec) and nothing from one another.
docs/add-an-engine.md leads through a new one.
"""

from hf_cloudtrain.jobs.engines.protocol import Engine, EngineStatus, engine

__all__ = ["Engine", "EngineStatus", "engine"]
