"""Jobs: one YAML file started on this machine, on Slurm, or on a cloud, and restarted until its training is over.

    cloudtrain job run -f job.yml -d ./code
        lifecycle   prepare, submit ------------------> records (the store), home folder with job.json
            engines     local, slurm, skypilot, sagemaker
                supervisor  restarts after a crash --> verdict
                    gang    all nodes of a job together
                        node    dataset, checkpoint, mounts, setup, command

Files and rooms, in reading order:

- `lifecycle`: submit, look, resume, cancel: what the command line calls.
- `records`: what is known of each job, on the user's store.
- `submission`: a job as its engine and its nodes receive it (`job.json`), without the values of variables.
- `spec`: the job file, from bytes to a plan. A room with its own README.
- `node`: what runs on each node. A room with its own README.
- `gang`: the nodes of a job as one unit: start, stop with grace, kill.
- `supervisor`: starts a gang, restarts it after a crash, writes the record.
- `start_failure`: why a command failed: what no restart can mend, and what is the same failure again.
- `verdict`: what happens to a job after one start, from the files that its nodes left.
- `engines`: one module or folder for each engine. A room with its own README.
- `logs`: the output of the nodes, followed or its last lines.
- `deletion`: deletes a job that is over; its run stays.
- `inventory`: the machine types that `cloudtrain vm list` shows, and what they cost.

Import order inside the room: `spec`, `submission` < `records`, `logs`, `inventory` < `node` < `gang`, `start_failure`, `verdict`, `supervisor`
< `engines` < `lifecycle` < `deletion`. Outside it imports `preemption`, `tracking`, `datasets`, `checkpoints`, `storage`, `env`,
`runtime`
and `errors`, and nothing of `integrations` or `cli`.
"""
