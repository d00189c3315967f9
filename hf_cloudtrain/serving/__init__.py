"""From a committed checkpoint to answers: a server that speaks SageMaker's contract.

    checkpoint -> models: verified files, a loaded pipeline
    request -> app -> formats -> batching -> model -> formats -> answer

In reading order:

- `models`     what answers: the files of a checkpoint, and the pipeline. A room with its own README.
- `user_code`  `code/inference.py` of a checkpoint, if the user trusts it
- `formats`    JSON, JSON Lines, CSV
- `metrics`    counters for Prometheus
- `batching`   rows of many requests share batches
- `app`        `/ping`, `/invocations`, `/metrics`, and the limits of size and time
- `server`     uvicorn, and an end that loses no request

Two rooms use the models without this server: `predict` (whole tables) and `endpoints` (models served until they are deleted).

    models < formats, metrics < user_code, batching < app < server
    models < predict, endpoints

What comes from storage and from clients is untrusted: see `models`. Only `app`, `metrics` and `server` need the extra `serve`. May
import `jobs`, `datasets` and the rooms below.
"""
