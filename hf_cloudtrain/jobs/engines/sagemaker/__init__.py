"""The engine `sagemaker`: training jobs of Amazon SageMaker.

On the machine of the submitter:

    engine.py           SagemakerEngine: what `check`, `submit`, `look`, `cancel` and `lines` do
    request.py          the request as data, and what SageMaker would refuse
    api.py              what is asked of AWS; the only file here that imports boto3

In each container of the training job:

    container_main.py   the entry point: signals first, then the rest; the exit code and the failure file
    stop_signal.py      SIGTERM before and while the job runs
    container.py        one container: its variables, its role
    layout.py           workspace, checkpoint folder and dataset at the paths of the job
    node_main.py        one start of this container's node, in a process of its own
    gang.py             how the first container runs the nodes of all: both ends of the conversation

    job run -> store, CreateTrainingJob -> container_main in algo-1: supervisor, gang -> node_main -> bash -> torchrun
                                                               ^ port 7778
                                           container_main in algo-2: agent           -> node_main -> bash -> torchrun

After a crash all nodes start again in the same containers, from the newest checkpoint. SageMaker ends the training job
as soon as one container ends with an error, so each container stays until all know how the job ended. SageMaker itself
restarts a managed spot job whose machines were preempted.
"""
