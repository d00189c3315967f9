"""The places that the contract suite runs on: every kind of storage, and both ways that bytes can take there."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import xxhash

from hf_cloudtrain.storage.client import Storage
from tests.servers import AZURITE_ACCOUNT, AZURITE_KEY, AzuriteServer, Server

NO_NATIVE_CLIENT = {
    "s3": {"version_aware": False},  # the defaults of s3fs and adlfs: no other effect than
    "az": {"max_concurrency": 4},  # that no native client knows them
}


@dataclass
class Place:
    """One run URL on one kind of storage, empty at first."""

    name: str
    url: str
    options: dict[str, Any] = field(default_factory=dict)
    server: Server | None = None
    exclusive: bool = True
    """Whether it honours an exclusive create."""
    native: bool = False
    """Whether a native client moves the bytes of files."""
    fill: Callable[[Iterable[str]], None] = lambda paths: None
    """Makes many objects of one byte, in a faster way than ours."""

    def open(self, suffix: str = "", **options: Any) -> Storage:
        return Storage(self.url + suffix, {**self.options, **options})


EXCLUSIVE = ("file", "memory", "moto", "azurite")
EVERY_KIND = ("file", "memory", "moto", "rclone", "azurite")
"""For what does not depend on the way that the bytes of files take."""
PLACES = ("file", "memory", "moto", "moto-fsspec", "rclone", "azurite", "azurite-fsspec")


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    yield from new_place(request, tmp_path)


def new_place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    kind, _, fsspec_only = request.param.partition("-")
    run = f"runs/{secrets.token_hex(4)}"
    if kind == "file":
        root = tmp_path / run
        yield Place("file", f"file://{root}", fill=lambda paths: write_files(root, paths))
    elif kind == "memory":
        yield from memory_place(run)
    else:
        server: Server = request.getfixturevalue(kind)
        made = server_place(kind, server, run)
        if fsspec_only:
            made.native = False
            made.options = {**made.options, **NO_NATIVE_CLIENT["az" if kind == "azurite" else "s3"]}
        yield made


def memory_place(run: str) -> Iterator[Place]:
    import fsspec

    fs = fsspec.filesystem("memory")

    def fill(paths: Iterable[str]) -> None:
        for path in paths:
            fs.pipe_file(f"/{run}/{path}", b"x")

    yield Place("memory", f"memory://{run}", fill=fill)
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def server_place(kind: str, server: Server, run: str) -> Place:
    scheme = "az" if kind == "azurite" else "s3"
    store = obstore_of(server, server.bucket)

    def fill(paths: Iterable[str]) -> None:
        put_many(store, (f"{run}/{path}" for path in paths))

    url = f"{scheme}://{server.bucket}/{run}"
    return Place(
        kind, url, server.storage_options, server, exclusive=kind != "rclone", native=True, fill=fill
    )


def write_files(root: Path, paths: Iterable[str]) -> None:
    for path in paths:
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x")


def put_many(store: Any, paths: Iterable[str]) -> None:
    import obstore

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda path: obstore.put(store, path, b"x", use_multipart=False), paths))


def obstore_of(server: Server, bucket: str) -> Any:
    from obstore.store import AzureStore, S3Store

    plain = {"allow_http": True}
    if isinstance(server, AzuriteServer):
        config = {"account_name": AZURITE_ACCOUNT, "account_key": AZURITE_KEY, "endpoint": server.account_url}
        return AzureStore(bucket, config=config, client_options=plain)
    given = server.storage_options
    config = {"access_key_id": given["key"], "secret_access_key": given["secret"], "region": "us-east-1"}
    return S3Store(bucket, config={**config, "endpoint": server.endpoint}, client_options=plain)


@pytest.fixture
def storage(place: Place) -> Iterator[Storage]:
    storage = place.open()
    yield storage
    storage.close()


def content(size: int) -> bytes:
    """Bytes that differ in every part, made quickly."""
    block = os.urandom(min(size, 2**16))
    numbered = (number.to_bytes(8, "big") + block for number in range(size // 2**16 + 1))
    return b"".join(numbered)[:size]


def digest(data: bytes) -> str:
    return "xxh3-128:" + xxhash.xxh3_128(data).hexdigest()
