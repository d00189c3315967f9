"""Where training stands, and how it resumes there: dataset, random states, schedule, under the old settings or new ones.

Reading order:

- `topology`: the position under a new world size, batch size or accumulation (law 8);
- `schedules`: moving a learning rate schedule to a different step;
- `random_state`: all random states of a process, captured, stored and restored;
- `dataloaders`: facts about a DataLoader, made by torch, Accelerate or torchdata;
- `data_position`: the position in an epoch of a DataLoader, and the resume there;
- its parts: `watched_sampler` (observes the fetches, and compares the fingerprint of their indices) and `loader_state`
  (streams and DataLoaders that save their own position);
- `optimizer_steps`: which optimizers have really stepped in a batch, and the gradients that wait for a step;
- `outside_state`: what the variables of a script hold besides the state that Accelerate saves;
- `fetch_witness`: whether fetching a batch draws random numbers, in this process or in a worker;
- `script_code`: which functions of the script the use of an object runs, and what they name; `script_counters`: what they count;
- `state_look`: whether what an object keeps changes while it trains; `module_state`: the same for a model;
- `sampler`: `ResumableSampler`, for loops that use neither Trainer nor TrainLoop;
- `step_samplers`: PeriFlow's two samplers, whose position is a number of steps.

    DataPosition.begin(epoch, record)          a resume
        WatchedSampler   skips by index   ->   OrderCheck compares fingerprints   ->   RandomState.restore()
        LoaderState      restores the stream, or says how much to read again

May import `checkpoints` (for `Position`) and the rooms below. The integrations use this room; it knows neither of them.
"""
