"""Bytes at a URL. This is the only room that imports fsspec or a native client, and the only one that retries requests.

    rooms ─> client ─> retries ─> silence ─┬─> fsspec_backend   any protocol of fsspec; names, records
               │          │                ├─> local_backend    folders on a disk
               └─> urls   └─> failures     └─> native           large files of s3://, gs:// and az://

In reading order:

- `client`: `Storage`, one run's location; all that other rooms call
- `urls`: protocol and folder of a URL, and the URL without credentials
- `retries`: which requests are tried again, how often, after which pause
- `silence`: requests without a byte or an answer are given up
- `failures`: what a client's error means, and what the user can do
- `backend`: the requests that every back end must answer; docs/add-a-storage-back-end.md
- `local_backend`, `fsspec_backend`: the back ends, and `connect`, which chooses one
- `native`: parallel transfers through obstore; `native_stores`: its credentials, region and endpoint for each cloud
- `diagnosis`: credentials, region, server and clock, for `cloudtrain doctor`
- `digest`: the digest algorithm; `names`: the folder of our own records, and safe paths
- `folder_files`: the files of a local folder that a storage can hold, and what it cannot hold

Imports only `errors` and `runtime`.
"""
