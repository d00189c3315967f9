"""Callbacks for the Hugging Face Trainer, which is neither subclassed nor patched.

    Trainer ── events ──> CloudTrainCallback ──> CheckpointUploadCallback ─┐
                                              ──> StepTrackerCallback ─────┼──> Session ──> AttemptLifecycle
                                              ──> EmergencySaveCallback ───┘

In reading order:

- `callbacks`      `CheckpointUploadCallback`, whose `on_save` begins the save path
- `cloud_callback` `CloudTrainCallback`, which is all three
- `step_callback`  `StepTrackerCallback`: feeds the heartbeat and the step records
- `emergency`      `EmergencySaveCallback`: where to save after a notice, around Trainer's evaluations
- `staged_saves`   which saves are asynchronous, and when Trainer waits for their files
- `reports`        the callbacks of W&B, MLflow, trackio and TensorBoard go on in one tracker run
- `session`        what callbacks of the same run share: the lifecycle, and what was restored
- `checks`         configurations that are refused before the first step
- `position`       where the Trainer stands, for the manifest
- `evidence`       what the callback notices of a training, event by event
- `exactness`      whether a resume equals an uninterrupted run, from all that was seen
- `worker_seeds`   the seed of loader processes that stay, which is drawn once in a run
- `outside_state`  state in callbacks, data, modules and a loss that no checkpoint holds
- `identity`       digests of model, arguments and data, and what differs when a checkpoint is restored
- `known_trainers` the trainer classes that were tested, and where each is known to differ
- `complete`       a run in which nothing is left to train: Trainer trains nothing, and the script goes on
- `forgotten`      a Trainer without the callback whose `restore` was called: an error at its first step
- `state`          trainer_state.json of a restored checkpoint, adapted to this machine
- `topology`       a checkpoint of other processes, batches or accumulation, converted to new steps

It imports `integrations.lifecycle` and lower rooms, and nothing from `loop/` and `functions/`.
"""
