"""The clients that the package is compared with, used as in their documentation, and the package itself.

Each moves a whole checkpoint folder: two large files and eight small files at a time, as this package does.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from benchmarks.measure import Checkpoint, Contestant, Workplace
from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
from hf_cloudtrain.checkpoints.manifest import Position

LARGE = 2**24
MIB = 2**20


@dataclass(frozen=True)
class Place:
    """An endpoint and a bucket on it."""

    endpoint: str
    key: str
    secret: str
    bucket: str = "bench"

    @classmethod
    def of(cls, server: Any, bucket: str = "bench") -> Place:
        options = server.storage_options
        return cls(server.endpoint, options["key"], options["secret"], bucket)

    @property
    def storage_options(self) -> dict[str, Any]:
        return {"key": self.key, "secret": self.secret, "endpoint_url": self.endpoint}


class Client(Protocol):
    """Moves one file."""

    name: str

    def put(self, source: Path, key: str) -> None: ...
    def get(self, key: str, target: Path) -> None: ...


class Obstore:
    """obstore with an unsigned payload, and the fastest of the block sizes tried."""

    name = "obstore"

    def __init__(self, place: Place) -> None:
        self._store = obstore_store(place)

    def put(self, source: Path, key: str) -> None:
        import obstore

        obstore.put(self._store, key, source)

    def get(self, key: str, target: Path) -> None:
        import obstore

        with open(target, "wb", buffering=0) as file:
            file.writelines(obstore.get(self._store, key).stream(min_chunk_size=MIB // 4))


class Opendal:
    """opendal with its defaults."""

    name = "opendal"

    def __init__(self, place: Place) -> None:
        self._operator = opendal_operator(place)

    def put(self, source: Path, key: str) -> None:
        with open(source, "rb", buffering=0) as file, self._operator.open(key, "wb") as target:
            while block := file.read(5 * MIB):
                target.write(block)

    def get(self, key: str, target: Path) -> None:
        buffer = bytearray(MIB)
        view = memoryview(buffer)
        with open(target, "wb", buffering=0) as file, self._operator.open(key, "rb") as source:
            while count := source.readinto(buffer):
                file.write(view[:count])


class Boto3:
    """boto3 with 4 parts of 64 MiB at a time, the fastest of the settings tried."""

    name = "boto3"

    def __init__(self, place: Place) -> None:
        import boto3
        from boto3.s3.transfer import TransferConfig

        self._client = boto3.client(
            "s3",
            endpoint_url=place.endpoint,
            aws_access_key_id=place.key,
            aws_secret_access_key=place.secret,
            region_name="us-east-1",
        )
        self._bucket = place.bucket
        self._config = TransferConfig(multipart_chunksize=64 * MIB, max_concurrency=4)

    def put(self, source: Path, key: str) -> None:
        self._client.upload_file(str(source), self._bucket, key, Config=self._config)

    def get(self, key: str, target: Path) -> None:
        self._client.download_file(self._bucket, key, str(target), Config=self._config)


def raw_clients(place: Place) -> list[Client]:
    return [Obstore(place), Opendal(place), Boto3(place)]


def raw_uploads(place: Place, checkpoint: Checkpoint) -> list[Contestant]:
    """Contestants that only send the files: no digest, no manifest."""

    def upload(client: Client) -> Contestant:
        def put(name: str) -> None:
            client.put(checkpoint.folder / name, f"raw-{client.name}/{name}")

        return Contestant(client.name, lambda: for_each_file(checkpoint, put))

    return [upload(client) for client in raw_clients(place)]


def raw_downloads(place: Place, checkpoint: Checkpoint, work: Workplace) -> list[Contestant]:
    """Upload the folder; return contestants that only fetch the files, without verification."""
    sender = Obstore(place)
    for_each_file(checkpoint, lambda name: sender.put(checkpoint.folder / name, f"raw/{name}"))
    target = work.folder / "downloaded"

    def download(client: Client) -> Contestant:
        def get(name: str) -> None:
            client.get(f"raw/{name}", target / name)

        return Contestant(
            client.name, lambda: for_each_file(checkpoint, get), prepare=lambda: work.fresh("downloaded")
        )

    return [download(client) for client in raw_clients(place)]


def s3fs_upload(place: Place, checkpoint: Checkpoint, rounds: int) -> Contestant:
    """`s3fs.put` of the folder, as in scripts."""
    import s3fs

    fs = s3fs.S3FileSystem(**place.storage_options)
    source = f"{checkpoint.folder}/"
    return Contestant("s3fs", lambda: fs.put(source, f"{place.bucket}/s3fs/", recursive=True), rounds=rounds)


class Ours:
    """A run of this package: from save to commit, and from URL to verified folder."""

    def __init__(self, place: Place, checkpoint: Checkpoint, work: Workplace) -> None:
        self._url = f"s3://{place.bucket}/run-{work.another()}"
        self._place, self._checkpoint, self._work = place, checkpoint, work
        self._step = 0

    def __enter__(self) -> Ours:  # noqa: PYI034 - typing.Self came with Python 3.11
        self.checkpointer = self.opened(self._work.fresh(f"ours-{self._work.another()}"))
        self.checkpointer.begin(0)
        return self

    def __exit__(self, *error: object) -> None:
        self.checkpointer.close()

    def opened(self, folder: Path) -> Checkpointer:
        """Return a connected Checkpointer for a local folder."""
        checkpointer = Checkpointer(self._url, folder, storage_options=self._place.storage_options)
        checkpointer.storage.check()
        return checkpointer

    def save_and_commit(self, step: int | None = None) -> None:
        self._step = self._step + 1 if step is None else step
        self.checkpointer.save(self._checkpoint.folder, Position(global_step=self._step))
        self.checkpointer.wait()

    def upload(self) -> Contestant:
        """Measures from `save` to the committed manifest."""
        return Contestant("ours", self.save_and_commit)

    def download(self) -> Contestant:
        """Measures from the URL to a verified folder, including probe and LIST."""
        opened = self.checkpointer

        def prepare() -> None:
            nonlocal opened
            opened = self.opened(self._work.fresh("restored"))

        return Contestant("ours", lambda: opened.restore(), prepare=prepare)  # noqa: PLW0108 - `opened` changes each round


def for_each_file(checkpoint: Checkpoint, move: Callable[[str], Any]) -> None:
    """Move all files of a folder: two large ones and eight small ones at a time."""
    with ThreadPoolExecutor(2) as large, ThreadPoolExecutor(8) as small:
        futures = [
            (large if size > LARGE else small).submit(move, name) for name, size in checkpoint.sizes.items()
        ]
        for future in futures:
            future.result()


def obstore_store(place: Place) -> Any:
    from obstore.store import S3Store

    return S3Store(
        place.bucket,
        endpoint=place.endpoint,
        access_key_id=place.key,
        secret_access_key=place.secret,
        region="us-east-1",
        unsigned_payload=True,
        client_options={"allow_http": True, "timeout": datetime.timedelta(minutes=5)},
    )


def opendal_operator(place: Place) -> Any:
    import opendal

    return opendal.Operator(
        "s3",
        bucket=place.bucket,
        endpoint=place.endpoint,
        access_key_id=place.key,
        secret_access_key=place.secret,
        region="us-east-1",
    )
