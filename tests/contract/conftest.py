"""The storage locations of the contract suite: each kind of storage, with each client that can move its bytes."""

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
    "s3": {"version_aware": False},  # defaults of s3fs and adlfs, which have no effect,
    "az": {"max_concurrency": 4},  # but which no native client knows
}


@dataclass
class Location:
    """An empty run URL on one kind of storage."""

    name: str
    url: str
    options: dict[str, Any] = field(default_factory=dict)
    server: Server | None = None
    exclusive: bool = True
    """Whether it honours an exclusive create."""
    native: bool = False
    """Whether a native client moves the bytes of files."""
    fill: Callable[[Iterable[str]], None] = lambda paths: None
    """Creates many objects of one byte, faster than `Storage` does."""

    def open(self, suffix: str = "", **options: Any) -> Storage:
        return Storage(self.url + suffix, {**self.options, **options})


EXCLUSIVE = ("file", "memory", "moto", "azurite")
EVERY_SERVER = ("file", "memory", "moto", "rclone", "azurite")
"""For tests in which it does not matter which client moves the bytes of files."""
LOCATIONS = ("file", "memory", "moto", "moto-fsspec", "rclone", "azurite", "azurite-fsspec")


@pytest.fixture(params=LOCATIONS)
def location(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Location]:
    yield from new_location(request, tmp_path)


def new_location(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Location]:
    kind, _, fsspec_only = request.param.partition("-")
    run = f"runs/{secrets.token_hex(4)}"
    if kind == "file":
        root = tmp_path / run
        yield Location("file", f"file://{root}", fill=lambda paths: write_files(root, paths))
    elif kind == "memory":
        yield from memory_location(run)
    else:
        server: Server = request.getfixturevalue(kind)
        made = server_location(kind, server, run)
        if fsspec_only:
            made.native = False
            made.options = {**made.options, **NO_NATIVE_CLIENT["az" if kind == "azurite" else "s3"]}
        yield made


def memory_location(run: str) -> Iterator[Location]:
    import fsspec

    fs = fsspec.filesystem("memory")

    def fill(paths: Iterable[str]) -> None:
        for path in paths:
            fs.pipe_file(f"/{run}/{path}", b"x")

    yield Location("memory", f"memory://{run}", fill=fill)
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def server_location(kind: str, server: Server, run: str) -> Location:
    scheme = "az" if kind == "azurite" else "s3"
    store = obstore_of(server, server.bucket)

    def fill(paths: Iterable[str]) -> None:
        put_many(store, (f"{run}/{path}" for path in paths))

    url = f"{scheme}://{server.bucket}/{run}"
    return Location(
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
def storage(location: Location) -> Iterator[Storage]:
    storage = location.open()
    yield storage
    storage.close()


def content(size: int) -> bytes:
    """Bytes that differ in every part, generated quickly."""
    block = os.urandom(min(size, 2**16))
    numbered = (number.to_bytes(8, "big") + block for number in range(size // 2**16 + 1))
    return b"".join(numbered)[:size]


def digest(data: bytes) -> str:
    return "xxh3-128:" + xxhash.xxh3_128(data).hexdigest()
