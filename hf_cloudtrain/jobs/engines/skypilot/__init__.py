"""The engine `skypilot`: machines of clouds, through SkyPilot's own command `sky`, which may be installed anywhere.

    engine.py      SkypilotEngine: what `check`, `submit`, `look`, `cancel` and `lines` do
    task.py        the task as data (YAML), the command line that launches it, and what SkyPilot would refuse
    client.py      the command `sky`: its answers, its job table, its log lines
    node_main.py   what SkyPilot runs on each machine

    job run -> sky jobs launch task.yaml -> on each machine: node_main -> jobs/node/node.py -> bash -> torchrun

`task.yaml` lies in the job's home. The values of variables go to `sky` in its environment: none is in a file, an
argument or a process listing. SkyPilot restarts a job by the exit codes of its nodes; node_main.py chooses them.
"""
