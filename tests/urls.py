"""What every door makes of a URL: its normal form, or a refusal with the form to type."""

from __future__ import annotations

HERE, HOME = "/project/here", "/home/user"
"""The current folder and the home folder for which the tables hold."""

NORMAL = {
    "s3://bucket/runs/mrpc": "s3://bucket/runs/mrpc",
    "s3://bucket/runs/mrpc/": "s3://bucket/runs/mrpc",
    "s3://bucket": "s3://bucket",
    "s3://bucket/a run/läuft": "s3://bucket/a run/läuft",
    "s3://bucket/runs/50%25_100%": "s3://bucket/runs/50%25_100%",
    "S3://Bucket/Runs": "s3://Bucket/Runs",
    " \ts3://bucket/run\n": "s3://bucket/run",
    "s3://bucket//runs///mrpc": "s3://bucket/runs/mrpc",
    "s3://bucket/./runs/./mrpc/.": "s3://bucket/runs/mrpc",
    "s3://arn:aws:s3:us-west-2:1234:accesspoint/name/run": "s3://arn:aws:s3:us-west-2:1234:accesspoint/name/run",
    "s3://bucket/run?": "s3://bucket/run?",
    "gs://bucket/run#1": "gs://bucket/run#1",
    "s3a://bucket/run": "s3a://bucket/run",
    "gs://bucket/run": "gs://bucket/run",
    "az://container/run": "az://container/run",
    "abfs://container@account.dfs.core.windows.net/run": "abfs://container@account.dfs.core.windows.net/run",
    "hf://buckets/me/bucket/run": "hf://buckets/me/bucket/run",
    "memory://run": "memory://run",
    "memory:///run": "memory://run",
    "sftp://host//data/run": "sftp://host/data/run",
    "hdfs:///data/run": "hdfs:///data/run",
    "file:///data/run/": "file:///data/run",
    "file:///data/../run": "file:///run",
    "file:////data//run": "file:///data/run",
    "file:///data/a?b#c": "file:///data/a?b#c",
    "file:///data/a%20run": "file:///data/a%20run",
    "file://localhost/data": "file:///data",
    "FILE:///data": "file:///data",
    "local:///data/run": "file:///data/run",
    "/data/run/": "/data/run",
    "/data//run/./x/..": "/data/run",
    "//data/run": "/data/run",
    "~/runs": f"{HOME}/runs",
}
"""Input: its normal form. Folders are absolute here, so a job file takes these too."""

RELATIVE = {
    "runs/mrpc": f"{HERE}/runs/mrpc",
    "./runs": f"{HERE}/runs",
    "../runs": "/project/runs",
    "bucket/runs": f"{HERE}/bucket/runs",
    "s3/runs": f"{HERE}/s3/runs",
    "runs/lr:1e-4": f"{HERE}/runs/lr:1e-4",
    "lr:1e-4/run": f"{HERE}/lr:1e-4/run",
    "runs//x": f"{HERE}/runs/x",
}
"""Folders below the current one. A job file refuses them, because its command runs elsewhere."""

REFUSED = {
    # typed with a part missing, or as pathlib writes it
    "s3:/bucket/run": "s3://bucket/run",
    "S3:/bucket/run": "s3://bucket/run",
    "s3//bucket/run": "s3://bucket/run",
    "s3:bucket/run": "s3://bucket/run",
    "s3;//bucket/run": "s3://bucket/run",
    "s3:://bucket/run": "s3://bucket/run",
    "s3 ://bucket/run": "s3://bucket/run",
    "s3 //bucket/run": "s3://bucket/run",
    "://bucket/run": "s3://bucket/run",
    "s3:": "s3://bucket/runs/mrpc",
    "gs:/bucket/run": "gs://bucket/run",
    "hf:buckets/me/bucket": "hf://buckets/me/bucket",
    "file:/data/run": "file:///data/run",
    "https//host/run": "https://host/run",
    "minio:/bucket/run": "./minio:/bucket/run",
    "me@host:/data/run": "sftp://me@host/data/run",
    # the bucket
    "s3://": "s3://bucket/runs/mrpc",
    "s3:///": "s3://bucket/runs/mrpc",
    "s3:///bucket/run": "s3://bucket/run",
    "az:///container/run": "az://container/run",
    "s3://<bucket>/run": "s3://bucket/run",
    "s3://~/run": "s3://bucket/run",
    "gs://my bucket/run": "gs://bucket/run",
    # not replaced by a value
    "$BUCKET/run": "s3://bucket/runs/mrpc",
    "s3://bucket/${USER}/run": "s3://bucket/runs/mrpc",
    "s3://bucket/$(date)/run": "s3://bucket/runs/mrpc",
    "s3://bucket/`date`/run": "s3://bucket/runs/mrpc",
    "s3://bucket/runs/{name}": "s3://bucket/runs/mrpc",
    "s3://{args.bucket}/run": "s3://bucket/runs/mrpc",
    "/data/$USER/run": "s3://bucket/runs/mrpc",
    "~missing-user-name/run": "./~missing-user-name/run",
    # characters
    "s3:\\\\bucket\\run": "s3://bucket/run",
    "s3://bucket\\run": "s3://bucket/run",
    "/data\\run": "/data/run",
    "C:\\data\\run": "/mnt/c/data/run",
    "C:/data/run": "/mnt/c/data/run",
    "s3://bucket/run\ns3://bucket/other": "s3://bucket/run",
    "s3://bucket/r\x1bun": "s3://bucket/run",
    "\ufeffs3://bucket/run": "s3://bucket/run",
    '"s3://bucket/run"': "s3://bucket/run",
    "'/data/run'": "/data/run",
    # within the path
    "s3://bucket/runs/../mrpc": "s3://bucket/mrpc",
    "s3://bucket/../mrpc": "s3://bucket/mrpc",
    "s3://bucket/run?versionId=1": "s3://bucket/run",
    "file://data/run": f"file://{HERE}/data/run",
    "file://~/run": "~/run",
    "file://": f"file://{HERE}",
    # protocols
    "s4://bucket/run": "s3://bucket/run",
    "s3n://bucket/run": "s3://bucket/run",
    "gcp://bucket/run": "gs://bucket/run",
    "azure://container/run": "az://container/run",
    "simplecache::s3://bucket/run": "s3://bucket/run",
}
"""Input: what its refusal tells to type."""
