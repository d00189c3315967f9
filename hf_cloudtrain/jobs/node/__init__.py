"""What runs on each node of a job, the same on every engine, and the copy of the user's folder that it runs in.

    submit:   workspace  -> a copy of the folder given with -d, without what its ignore_files exclude
    start:    node       -> dataset -> restore -> folders, mounts -> setup -> command -> exit code and node file
                                                    |
                                 namespace, bubblewrap, docker or links

Files, in reading order:

- `node`: the program on a node, from the dataset to the exit code; what it does when a stop signal arrives.
- `stopping`: the stop signals, and how long each layer waits before it kills the one below it.
- `restore`: the newest checkpoint of the run, into the job's checkpoint folder.
- `folders`: which folders of the job are mounted, and where its checkpoints really are.
- `mounts`: folders at the job's paths by a mount namespace, bubblewrap or links; refuses what would hide something.
- `namespace`: the small program that enters a mount namespace and becomes the command. Imports nothing of ours.
- `docker`: the command in a container, if the job names an image and the machine has docker.
- `workspace`: the copy of the user's folder; complete or not there at all.
- `archive`: that copy as one file, for an engine without shared disks.
- `ignore_files`: `.cloudtrainignore` and `.gitignore`, as git reads them.

Imports: `spec`, `submission` and lower rooms (`datasets`, `tracking`, `checkpoints`, `storage`, `env`, `runtime`,
`errors`); nothing of `gang`, `supervisor` or `engines`.
"""
