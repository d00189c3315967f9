"""`init`, `train_step`, `upload_checkpoint` and the others: for any PyTorch loop, function by function.

In reading order:

- `api`    the functions, and which of them may follow which
- `async_writes`  staged saves of a folder that is written again and again
- `trackers`  what a script passes to W&B, MLflow and others so that they go on
- `modes`  what they do: `RemoteRun` with a run URL, `LocalRun` (a local log of metrics) without one

The checkpoint is one folder that the script writes again and again, so each upload copies it. It imports
`integrations.lifecycle` and lower rooms, and nothing from `trainer/` and `loop/`.
"""
