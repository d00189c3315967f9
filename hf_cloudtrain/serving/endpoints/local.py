"""Endpoints of this machine: each a job of the engine `local` that runs `cloudtrain serve`.

Its supervisor outlives the terminal, restarts the server after a crash, and keeps its log.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from hf_cloudtrain import env
from hf_cloudtrain.errors import CloudTrainError, ConfigurationError, NoJobError
from hf_cloudtrain.jobs import deletion, lifecycle
from hf_cloudtrain.jobs.logs import last_lines
from hf_cloudtrain.jobs.spec.job import Job
from hf_cloudtrain.jobs.submission import Submission
from hf_cloudtrain.runtime.text import count_text
from hf_cloudtrain.serving.endpoints.records import Endpoint, Endpoints, State

RESTARTS = 10_000
GRACE = "80"
"""Seconds for the end of a server, in which a request may take 60."""
POLL = 0.3
PATIENCE = 600.0
"""Seconds for a download and the start of a server, or for its end."""


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
            "env": {env.GRACE: GRACE},
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
        record = lifecycle.look(endpoints.jobs, endpoints.jobs.read(_job(endpoint)))
    except NoJobError:
        return State("gone", "Its job was deleted.")
    if record.is_over:
        return State("failed", record.reason or record.state)
    if record.state == "stopping":
        return State("deleting")
    is_ready = False
    with contextlib.suppress(OSError):
        is_ready = _request(endpoint, "GET", "/ping", None, {}, 5.0)[0] == 200
    restarts = count_text(record.restarts, "restart") if record.restarts else None
    return State("in service" if is_ready else "starting", restarts)


def invoke_local(endpoints: Endpoints, endpoint: Endpoint, body: bytes, kind: str, accept: str) -> bytes:
    """The answer to a request. Raises CloudTrainError with the server's own error."""
    state = look_local(endpoints, endpoint)
    if state.word in ("failed", "gone"):  # a different program may have the port now
        raise CloudTrainError(f"The endpoint {endpoint.name!r} does not run. {state.reason}")
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
    jobs = endpoints.jobs
    with contextlib.suppress(NoJobError):
        record = jobs.read(_job(endpoint))
        if record.engine != "local":
            raise ConfigurationError(
                f"The job {record.id!r} of the endpoint {endpoint.name!r} has the engine {record.engine!r}, not 'local': its "
                f"record is damaged. Nothing was deleted. Look at it with `cloudtrain job status {record.id}`."
            )
        job = record.id
        with contextlib.suppress(ConfigurationError):  # it is over
            lifecycle.cancel(jobs, job)
        deadline = time.monotonic() + PATIENCE
        while True:
            try:  # the supervisor writes that the job is over, and exits a moment later
                deletion.delete(jobs, job, deletion.home(jobs, job, deletion.find(jobs, job)))
                break
            except ConfigurationError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(POLL)
    endpoints.remove(endpoint.name)


def _job(endpoint: Endpoint) -> str:
    """The id of its job; a `create` that was killed may not have recorded it, so the newest of its name."""
    return str(endpoint.handle.get("job", f"endpoint-{endpoint.name}"))


def _request(
    endpoint: Endpoint, method: str, path: str, body: bytes | None, headers: dict[str, str], seconds: float
) -> tuple[int, bytes]:
    port = str(endpoint.handle.get("url", ":0")).rpartition(":")[2]
    connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=seconds)
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
