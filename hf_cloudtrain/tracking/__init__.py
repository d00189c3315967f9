"""What a run did and does: recorded while it trains, and read again by any machine.

Reading order:

- `tracker`: times of steps, metrics and pauses, in memory; a thread of rank 0 stores them with the heartbeat;
- `host`: how busy the machine is, for the heartbeat;
- `records`: where the step and metric records are on storage;
- `evidence`: how far an attempt came, by heartbeat, record, save and commit;
- `stretches`: when each step was finished, and the periods without a finished step;
- `history`: the records of all attempts joined to one history, without steps that were redone;
- `status`: how a run stands now, from its newest heartbeat alone;
- `mirror`: the records of a run in memory, read once each;
- `watcher`, `stop`: a run observed until it is over, or requested to stop; `actions`: who did what from a page;
- `exit_record`: how an attempt ended, in a file for the launcher;
- `services/`: the tracker run (W&B, MLflow …) in which the curves of a run go on.

    training loop -> StepTracker -> progress/000003.json        -> status -> watcher, stop
                                 -> steps/000003-0001.jsonl     -> history -> report, watcher
    end of an attempt -> exit_record -> the file for the launcher

A heartbeat is also evidence of ownership, so `checkpoints` writes and reads it (`checkpoints/attempts.py`). May import
`checkpoints` and the rooms below.
"""
