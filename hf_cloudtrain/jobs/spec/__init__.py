"""What users write about jobs: `job.yml` and `vms.yml`, read as untrusted text, with every problem reported by its line.

    bytes -> document -> diagnostics -> job, job_file -> node_plan
             YAML as     models, and     keys, values,    nodes, processes and the
             plain data  all problems    relations        environment of each node

Files, in reading order:

- `job_file`: `read_job` and `parse_job`; checks values against each other.
- `job`: the keys of a job file, as models, and how devices become nodes. Docstrings are descriptions in the JSON schema.
- `values`: the type of each value (names, paths, URLs, counts, machine types), and what its error says.
- `node_plan`: nodes, processes, and the variables that every engine sets for the script (`CONTRACT`).
- `vms_file`: the user's own list of machines.
- `document`: YAML by its parser alone, so that `no` and `010` stay text; the line of every key.
- `diagnostics`: errors of the models as sentences, with the nearest known key.

Imports: only lower rooms (`checkpoints` for the rule of folder names, `env`, `runtime`, `errors`). It starts nothing and
reads only the job file.
"""
