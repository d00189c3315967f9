"""Endpoints: models that are served until they are deleted, on this machine or by SageMaker.

    <store>/endpoints/nsmc.json    the record of the endpoint nsmc, made before anything else and removed last

In reading order:

- `records`    the record of an endpoint, which is untrusted when it is read
- `local`      on this machine: a job that runs `cloudtrain serve`
- `sagemaker`  by SageMaker, with Hugging Face's inference container

May import `serving/models`, `jobs` and the rooms below.
"""
