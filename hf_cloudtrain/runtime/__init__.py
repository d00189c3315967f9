"""What every room needs from the process, the machine and the other ranks; nothing about storage or checkpoints.

In reading order:

- `ranks`: the rank of this process; one decision or one error for all ranks (`Ranks.agree`, `Ranks.each`)
- `rendezvous`: how ranks communicate before a process group exists
- `threads`: parallel work, time limits, turns that survive errors, and work before the process ends
- `files`: locks, and folders that a process is still making
- `process_tree`: find and end the processes below this one; `own_process`: start one that runs code of this package
- `tracebacks`: one short traceback for an expected error of ours
- `redaction`: texts without credentials; `provenance`: host, versions and command line of a run
- `listening`: the socket of a server on this machine, and which browsers may ask it
- `patience`: a wait of more than a few seconds says what it waits for
- `progress`: the progress bar of a transfer; `text`: sizes, times and durations for people
- `values`: numbers and texts as JSON holds them; `patches`: what changed between two documents of JSON

Imports only `errors`.
"""
