"""Who announces a preemption, how all ranks agree on the step of the emergency save, and how they leave together.

    SIGTERM, Ctrl-C …          stop file, `cloudtrain run stop`, EC2, GCE, Azure
          │ signals                        │ sources, cloud_metadata
          └───────────────┬────────────────┘
                     Preemption ── votes after each step ── Agreement (all ranks)
                          │
        integrations: save at the agreed step, then Preemption.leave

In reading order:

- `preemption`      the class `Preemption`: takes note of notices, votes, announces the save, leaves with exit code 75
- `agreement`       `StopDecision`, and how the ranks vote without waiting for each other
- `save_clock`      when a save by time is due: its vote travels with those about notices
- `signals`         handlers that only take a note, and give the signals back afterwards
- `sources`         everything else that a notice may come from, each watched in a thread of its own
- `cloud_metadata`  what the metadata services of EC2, Google and Azure answer

It knows no framework: `integrations/` asks `Preemption.step_ended` after each optimizer step and saves where it says so. It may
import `errors`, `runtime`, `env`, `storage`, `checkpoints`, `tracking` and `resume`.
"""
