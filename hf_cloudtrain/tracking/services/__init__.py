"""Tracker services (W&B, MLflow, trackio, TensorBoard): one tracker run for a run, on whatever machine it trains.

    attempt begins ── which id? ──> runs.py: <run URL>/.cloudtrain/trackers/mlflow-0001.json
                   ── start with it ──> the service's own callback or tracker
                   ── what has it got? ──> TrackerContent: the last step of each metric
    a log          ── already sent: left out; missing up to the resumed step: sent again from the checkpoint's log

In reading order:

- `service`      `TrackerService`: what a service must be able to do, and `register_tracker` for one more
- `runs`         which tracker run belongs to the run, one small record on storage each
- `choice`       whether an attempt goes on in the tracker run of the one before, and in which one if not
- `event_files`  files of a tracker that are part of the run: stored while it trains, and restored
- `guard`        an error of a tracker is logged once, and training goes on
- `wandb`, `mlflow`, `trackio`, `tensorboard`  the four, each with the facts about its service

The package of a service is imported only when a training reports to it. Imports nothing of `integrations/`, which decide what is
sent.
"""
