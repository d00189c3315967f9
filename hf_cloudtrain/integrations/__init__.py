"""How a training script uses this package: Trainer callbacks, a loop for Accelerate, or plain functions.

    trainer/ ──┐                      ┌── preemption/   save on a notice, and leave together
    loop/    ──┼── lifecycle ─────────┼── tracking/     heartbeat, step records, exit file
    functions/─┘       │              └── resume/       the position in data and schedule
                       └── checkpoints/   save, upload, restore

In reading order:

- `lifecycle`   `AttemptLifecycle`: restore, begin, track, listen, finish or leave; and the only registry of Checkpointers
- `staged_saves`  asynchronous saves: whether there are any, and who waits for their files
- `messages`    the first and the last line of a training, and how messages are shown
- `trainer/`    callbacks for the Hugging Face Trainer; the save path begins in `trainer/callbacks.py`
- `loop/`       `TrainLoop`, for people who write their own loop with Accelerate
- `functions/`  `init`, `train_step`, `upload_checkpoint` and the others, for any PyTorch loop
- `axolotl`     the plug-in that axolotl imports where its configuration names it; it uses `trainer/`

The three folders import nothing from one another: what they have in common is in `lifecycle`. They may import every lower room, and
only `cli/` and `testing/` may import them. Importing `hf_cloudtrain` alone imports none of them.
"""
