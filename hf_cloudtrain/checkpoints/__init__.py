"""Checkpoints on their way to storage and back: saved, uploaded, committed, restored, deleted.

    save    checkpointer ─▶ outbox ─▶ upload_queue ─▶ sender ─▶ catalog        (a thread from upload_queue on)
    load    checkpointer ─▶ restore ─▶ catalog ─▶ download

The save path, in reading order:
    checkpointer     one run seen from one process: restore, begin, save, wait, finish, close
    outbox           the local folder of what is saved and not committed yet
    late_files       the files of a save that are written in the background, as the Checkpointer sees them
    frozen           a saved folder in the outbox: how its files are linked or copied, and what is known of it
    upload_queue     the thread that uploads what the outbox holds, newest first
    sender           one entry: claim, send, check, commit
    catalog          which checkpoints exist: the only module that decides it

Records on storage:
    manifest         manifest, position and key of a checkpoint: formats and checks
    paths            where each record is
    exactness        whether a resume from a checkpoint equals an uninterrupted run: yes, no, or not verified
    digests          what a checkpoint was trained from: texts for its manifest
    attempts         the attempts of a run: numbers, heartbeats, stop requests
    completion       that training is over before its last planned step, as by early stopping
    ownership        whether an attempt is still the newest (law 6)
    attempt_checks   what is checked when an attempt begins and ends (laws 5 and 9)
    named_folders    folders that are saved by name, and datasets

Load and local disk:
    restore          the newest checkpoint, the same on all ranks
    download         from a manifest to a verified folder
    local_folders    the usual layout on disk: one folder a checkpoint
    local_home       `_cloudtrain/`: our own files below an output folder
    in_place         the layout of plain PyTorch scripts: one folder for all checkpoints

Less often:
    titles           what people call a checkpoint: its folder
    run_deletion     a whole run is deleted
    retention        which checkpoints stay on storage (law 10)
    deletion         deleting one checkpoint, in an order that can be interrupted
    leftovers        what interrupted work has left on storage
    flush            emptying the outbox in the foreground
    folder_upload    `cloud.save(folder, name)`
    upload_status    how the uploads stand, for the tracker
    host_shares, host_parts, commit_watch    several hosts with disks of their own
    rehearsal        what differs under `cloudtrain verify-resume`

Imports `errors`, `env`, `runtime` and `storage`.
"""
