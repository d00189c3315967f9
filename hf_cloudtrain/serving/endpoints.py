"""Endpoints: models that are served until they are deleted, on this machine or by SageMaker.

    <store>/endpoints/nsmc.json    the record of the endpoint nsmc, made before anything else and removed last

On this machine an endpoint is a job of the engine `local` that runs `cloudtrain serve`: its supervisor outlives the terminal,
restarts the server after a crash, and keeps its log.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.manifest import decode_record, encode_record
from hf_cloudtrain.errors import CloudTrainError, ConfigurationError, ManifestError, NoJobError
from hf_cloudtrain.jobs import deletion, lifecycle
from hf_cloudtrain.jobs.logs import last_lines
from hf_cloudtrain.jobs.records import JobStore
from hf_cloudtrain.jobs.spec.job import Job
from hf_cloudtrain.jobs.submission import Submission
from hf_cloudtrain.storage.client import Storage

EngineName = Literal["local", "sagemaker"]
NAME = r"[A-Za-z0-9](?:-?[A-Za-z0-9]){0,39}"
"""As SageMaker allows it, with room for what it is part of."""
RESTARTS = 10_000
POLL = 0.3
PATIENCE = 600.0
"""Seconds for a download and the start of a server, or for its end."""


@dataclass(frozen=True)
class Endpoint:
    """The record of an endpoint."""

    name: str
    engine: EngineName
    model: str
    """What is served, for people."""
    created: float
    handle: dict[str, Any] = field(default_factory=dict)
    """Of the engine: the job and the URL, or the names that SageMaker knows."""


@dataclass(frozen=True)
class State:
    """How an endpoint is now."""

    word: str
    """`in service`, `starting`, `deleting`, `failed` or `gone`."""
    reason: str | None = None


class Endpoints:
    """The endpoints of a store."""

    def __init__(self) -> None:
        self.jobs = JobStore()
        self._storage = Storage(self.jobs.below("endpoints"), env.storage_options(None))

    def add(self, endpoint: Endpoint) -> None:
        """Make the record. Raises ConfigurationError: the name is taken or not valid."""
        if not re.fullmatch(NAME, endpoint.name):
            raise ConfigurationError(
                f"{endpoint.name[:100]!r} is not a valid name of an endpoint. Use up to 40 letters, digits and single '-'."
            )
        if not self._storage.create(f"{endpoint.name}.json", encode_record(dataclasses.asdict(endpoint))):
            raise ConfigurationError(
                f"There is an endpoint {endpoint.name!r} already. Delete it (`cloudtrain endpoint delete {endpoint.name}`), or "
                "choose a different name."
            )

    def write(self, endpoint: Endpoint) -> None:
        """Write the record again."""
        self._storage.write(f"{endpoint.name}.json", encode_record(dataclasses.asdict(endpoint)))

    def remove(self, name: str) -> None:
        """Remove the record."""
        self._storage.delete([f"{name}.json"])

    def names(self) -> list[str]:
        """Of all endpoints, sorted."""
        found = (info.path for info in self._storage.list(""))
        return sorted(path.removesuffix(".json") for path in found if path.endswith(".json"))

    def read(self, name: str) -> Endpoint:
        """The record of an endpoint. Raises ConfigurationError, ManifestError."""
        try:
            if not re.fullmatch(NAME, name):
                raise FileNotFoundError
            found = decode_record(self._storage.read(f"{name}.json"), f"record of the endpoint {name!r}")
            known = {one.name for one in dataclasses.fields(Endpoint)}
            endpoint = Endpoint(**{key: value for key, value in found.items() if key in known})
            if endpoint.name != name or not isinstance(endpoint.handle, dict):
                raise TypeError("it is not about this endpoint.")
            return endpoint
        except FileNotFoundError:
            raise ConfigurationError(
                f"There is no endpoint {name[:100]!r} in {self.jobs.url!r}. List them with `cloudtrain endpoint list`."
            ) from None
        except TypeError as error:
            raise ManifestError(f"The record of the endpoint {name!r} is damaged: {error}") from None


def create_local(
    endpoints: Endpoints, endpoint: Endpoint, words: Sequence[str], port: int, on_wait: Callable[[str], None]
) -> Endpoint:
    """Serve on this machine until `delete_local`; returns when the server answers.

    Args:
        words: of `cloudtrain serve`, with absolute paths.
        on_wait: receives what is waited for.

    Raises:
        ConfigurationError: the server did not start; nothing is left of it.
    """
    command = shlex.join([sys.executable, "-m", "hf_cloudtrain.cli", "serve", *words, "--port", str(port)])
    job = Job.model_validate(
        {
            "name": f"endpoint-{endpoint.name}",
            "job_setting": {"docker": {"command": command}},
            "max_restarts": RESTARTS,
        }
    )
    endpoints.add(endpoint)
    try:
        record = lifecycle.submit(lifecycle.prepare(job, endpoints.jobs), endpoints.jobs)
        handle = {"job": record.id, "url": f"http://127.0.0.1:{port}"}
        endpoint = dataclasses.replace(endpoint, handle=handle)
        endpoints.write(endpoint)
        on_wait(f"Starting the server; its log: `cloudtrain job logs -f {record.id}`.")
        deadline = time.monotonic() + PATIENCE
        while (state := look_local(endpoints, endpoint)).word != "in service":
            if state.word in ("failed", "gone") or time.monotonic() > deadline:
                log = Submission.load(record.home).node_log(0)
                said = (
                    [line for line in last_lines(log, 20) if line.startswith("Error: ")]
                    if log.exists()
                    else []
                )
                raise ConfigurationError(
                    said[-1].removeprefix("Error: ") if said else f"The server did not start. {state.reason}"
                )
            time.sleep(POLL)
        return endpoint
    except BaseException:
        with contextlib.suppress(CloudTrainError):
            delete_local(endpoints, endpoint)
        raise


def look_local(endpoints: Endpoints, endpoint: Endpoint) -> State:
    """How the job and its server are."""
    try:
        record = lifecycle.look(endpoints.jobs, endpoints.jobs.read(str(endpoint.handle.get("job"))))
    except NoJobError:
        return State("gone", "Its job was deleted.")
    if record.is_over:
        return State("failed", record.reason or record.state)
    if record.state == "stopping":
        return State("deleting")
    try:
        status, _ = _request(endpoint, "GET", "/ping", None, {}, 5.0)
    except OSError:
        return State("starting", f"{record.restarts} restarts" if record.restarts else None)
    return State(
        "in service" if status == 200 else "starting",
        f"{record.restarts} restarts" if record.restarts else None,
    )


def invoke_local(endpoint: Endpoint, body: bytes, kind: str, accept: str) -> bytes:
    """The answer to a request. Raises CloudTrainError with the server's own error."""
    try:
        status, answer = _request(
            endpoint, "POST", "/invocations", body, {"content-type": kind, "accept": accept}, 120.0
        )
    except OSError as error:
        raise CloudTrainError(
            f"{endpoint.handle.get('url')} does not answer ({error}). Look at it with `cloudtrain endpoint view {endpoint.name}`."
        ) from None
    if status != 200:
        raise CloudTrainError(
            f"The endpoint answered with status {status}: {answer.decode(errors='replace')[:1000]}"
        )
    return answer


def delete_local(endpoints: Endpoints, endpoint: Endpoint) -> None:
    """Stop the server, which answers what it has accepted, and delete the job and the record."""
    job = endpoint.handle.get("job")
    with contextlib.suppress(NoJobError):
        record = lifecycle.look(endpoints.jobs, endpoints.jobs.read(str(job)))
        if not record.is_over:
            lifecycle.cancel(endpoints.jobs, record.id)
        deadline = time.monotonic() + PATIENCE
        while not (record := lifecycle.look(endpoints.jobs, endpoints.jobs.read(record.id))).is_over:
            if time.monotonic() > deadline:
                raise CloudTrainError(
                    f"The job {record.id!r} does not stop: {record.reason}. Run the command again."
                )
            time.sleep(POLL)
        home = deletion.home(endpoints.jobs, record.id, record)
        while True:
            try:  # the supervisor writes that the job is over, and exits a moment later
                deletion.delete(endpoints.jobs, record.id, home)
                break
            except ConfigurationError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(POLL)
    endpoints.remove(endpoint.name)


def _request(
    endpoint: Endpoint, method: str, path: str, body: bytes | None, headers: dict[str, str], seconds: float
) -> tuple[int, bytes]:
    url = str(endpoint.handle.get("url"))
    at = re.fullmatch(r"http://127\.0\.0\.1:(\d{1,5})", url)
    if at is None:  # the record comes from storage: it must not send what a user asks to a different machine
        raise OSError(f"{url[:100]!r} is not an address of this machine")
    connection = http.client.HTTPConnection("127.0.0.1", int(at[1]), timeout=seconds)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except http.client.HTTPException as error:
        raise OSError(str(error) or type(error).__name__) from None
    finally:
        connection.close()


def absolute(run: str) -> str:
    """A run or model as the server of an endpoint finds it, which runs in a different folder."""
    return str(Path(run).absolute()) if "://" not in run and Path(run).exists() else run
