"""From a committed checkpoint to answers: a server that speaks SageMaker's contract, and predictions for whole tables.

    checkpoint -> source: verified files, task -> predictor (pipeline), or user_code
    request -> app -> formats -> batching ---> predictor -> formats -> answer
    table -> tables -> predict: shards ------> predictor -> committed parts -> table

In reading order:

- `tasks`      which architectures are served, and what a client may set
- `source`     the folder of a model: downloaded and verified, and what it holds
- `untrusted`  what the files of a model may not make transformers and peft do
- `predictor`  a loaded pipeline: an answer or an error for each row
- `user_code`  `code/inference.py` of a checkpoint, if the user trusts it
- `formats`    JSON, JSON Lines, CSV
- `metrics`    counters for Prometheus
- `batching`   rows of many requests share batches
- `app`        `/ping`, `/invocations`, `/metrics`, and the limits of size and time
- `server`     uvicorn, and an end that loses no request
- `tables`     parquet, CSV and JSON Lines, read and written
- `predict`    a table in shards, each committed by its manifest
- `scores`     accuracy and F1 of such a table
- `endpoints`  servers that run until they are deleted: records, and those of this machine
- `sagemaker`  endpoints of SageMaker

What comes from storage and from clients is untrusted: see `source`, `untrusted` and `predictor`. torch, transformers and starlette are
imported late or only by the modules that need them. May import `jobs`, `datasets` and the rooms below.
"""
