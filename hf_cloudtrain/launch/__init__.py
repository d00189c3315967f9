"""`cloudtrain launch`: a command that trains with Trainer or saves through Accelerate, unmodified, gets checkpoints and resume.

    cloudtrain launch ── command ──> starts it, with hook/ in front of PYTHONPATH
                                        │  in each Python below it
                    hook/sitecustomize ─┴─ waits until transformers or accelerate is imported
                                                │
                                            hooks ──> trainer ──────> integrations.trainer: callback and restore
                                                  └─> accelerator ──> folders of save_state: uploaded, restored

In reading order:

- `environment`  the variables that put the hook into each Python below a command
- `hook/`        the folder in front of `PYTHONPATH`; its `sitecustomize.py` imports nothing until a training library is there
- `hooks`        which of its functions are wrapped once a library is there
- `trainer`      `Trainer.train`: the callback joins, and what was restored is resumed from
- `accelerator`  `Accelerator.save_state` and `load_state`: the folders of a plain script are checkpoints
- `state_folders`  the names of these folders, and where they are on a different machine
- `steps`        optimizer steps, counted for them
- `marks`        marks of the ranks of one machine, which agree on nothing there
- `numbering`    which run a training belongs to, where one script trains several times
- `notes`        what the processes below a command tell it, and what it says at the end if nothing was hooked
- `before`       what is restored and tidied before the command starts
- `afterwards`   what is safe where the command failed, and what the same command does
- `command`      runs the command: signals are passed on, its exit code is kept

Nothing is hooked in any other process, and nothing is installed. Jobs with `launch: auto` use the same variables. It imports
`integrations` and lower rooms.
"""
