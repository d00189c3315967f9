"""The commands: a file a group, each with the options, the help texts and the tables of its commands.

    checkpoint      list, view, download, verify, delete, pin, prune, flush
    run             list, status, watch, report, stop, clean, delete
    job             run, list, status, logs, cancel, delete, template, schema; `job.yml` is the template
    data            create, list, view, download, delete, clean
    vm              list
    endpoint        create, list, view, invoke, delete
    doctor          `cloudtrain doctor`
    launch          `cloudtrain launch`
    serve           `cloudtrain serve`
    predict         `cloudtrain predict`
    verify_resume   `cloudtrain verify-resume`
    ui              `cloudtrain ui`
    new             `cloudtrain new`

A command prints one JSON object with `--json`, and has an example in its help and a section in `docs/cli.md`; tests check
both. To add a column to a table, add an entry to its `Columns`, which is in the same file (for `run status` in
`cli/status.py`). Code that only one command needs and that is longer than a screen has a file of its own in `cli/`. This
room may import everything that `cli/` may.
"""
