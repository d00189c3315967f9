"""`TrainLoop`: the safety of the Trainer callbacks for people who write their own loop with Accelerate.

    for epoch in loop.epochs():               loop       resume, attempt, end
        for batch in loop.steps(loader):      steps      position, saves, stop
        loop.log(loss=loss)                   reporting  bar, records, trackers
    loop.end_epoch({"loss": …})               folder     checkpoint-<step>, best/, last/

In reading order:

- `loop`       the class that users see
- `steps`      one epoch: batches, optimizer steps, and the saves that are due
- `folder`     how a save gets into a folder, and out of it again
- `state`      the files in it: Accelerate's, made loadable by `from_pretrained`, and training_state.json
- `data_evidence`   random numbers that loader processes draw, and data that keeps state of its own
- `complete`   a run that `stop(complete=True)` ended
- `reporting`  the means of what was logged: on the bar, in the records, in the accelerator's trackers
- `trackers`   the accelerator's trackers go on in one tracker run
- `topology`   where the loop stands, for the manifest, and how a checkpoint of a different topology is converted

It imports `integrations.lifecycle` and lower rooms, and nothing from `trainer/` and `functions/`.
"""
