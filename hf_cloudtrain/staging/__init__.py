"""Asynchronous saves: training waits for one copy in memory, and a process of its own writes the files.

While the framework saves, tensors are copied into shared memory instead of being written (*staging*). The *writer*, one process
a host, then makes the very files that the framework would have made, hands the checkpoint to the outbox, and gives the folder
its final name. Until then the folder lies in `_cloudtrain/saving/`, where no reader looks for checkpoints.

In reading order:

    saves           AsyncSaves: what Trainer callback and loop call; when a save is staged, and who waits for what
    window          which functions of torch, safetensors and shutil are replaced during a save, and for which paths
    recorders       what stands in for the file of torch.save and for safetensors' serialize_file
    pickling        torch.save's pickler, faster
    copies          copies of tensors into the shared memory, on more than one core
    memory          the shared memory: room, population
    job             the description of one save, which lies in that memory, too
    process         the writer as the training sees it: start, hand over, restart when it dies
    archive         the zip archive of a torch.save, without torch
    writer          the writer process: files, outbox, final name; it finishes what a killed training has staged

If the training is killed, the writer goes on: it finishes the files, hands them over, and uploads them.

Imports `errors`, `env`, `runtime`, `storage` and `checkpoints`.
"""
