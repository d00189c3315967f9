"""What `cloudtrain verify-resume` does: train twice, and compare.

    trial       start the user's script in a scratch folder, follow its run, kill it, start it again
    compare     two finished runs: files number by number, positions in the data, logged values

    trial 1   |--------- whole run ---------|
    trial 2   |---- killed ✗   |-- resumed --|     compare the last checkpoints, and all steps that both have

The command, its messages and its exit code are in `commands/verify_resume.py`. In a trial, the training itself writes
only into the scratch folder and waits at the step after which it is killed: see `checkpoints/rehearsal.py`. This room
imports `checkpoints/`, `tracking/` and what is below them, and nothing of the rest of `cli/`.
"""
