"""One container of a training job: its variables, its place among the hosts, and its part of the job."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_cloudtrain.errors import CloudTrainError
from hf_cloudtrain.jobs.engines.sagemaker.gang import PORT, Agent, ContainerGang
from hf_cloudtrain.jobs.engines.sagemaker.layout import Layout
from hf_cloudtrain.jobs.engines.sagemaker.node_main import MASTER_PORT, NodeProcess
from hf_cloudtrain.jobs.engines.sagemaker.request import OWN_CHANNEL
from hf_cloudtrain.jobs.engines.sagemaker.stop_signal import StopSignal, outcome
from hf_cloudtrain.jobs.records import JobStore
from hf_cloudtrain.jobs.submission import FILE, Submission
from hf_cloudtrain.jobs.supervisor import Supervisor
from hf_cloudtrain.jobs.verdict import Verdict
from hf_cloudtrain.runtime.process_tree import adopt_orphans

logger = logging.getLogger(__name__)

PATIENCE = 300.0
"""Seconds until the name of node 0 must resolve. SageMaker says that names may come later than containers."""
PAUSE = 1.0
"""Seconds between two tries to resolve it."""


class Container:
    """One container of a training job.

    Args:
        root: SageMaker's folder.
    """

    def __init__(self, root: Path, stop: StopSignal) -> None:
        self._root = root
        self._stop = stop
        self._resources = self._config("resourceconfig")
        self.host = str(self._resources.get("current_host", "algo-1"))
        # Sorted by name, as SageMaker does: the ranks must be the same in every container.
        self.hosts = sorted(map(str, self._resources.get("hosts", [self.host])))

    def run(self) -> tuple[str, str | None]:
        """Run this container's part; return state and reason of the job."""
        os.environ.update(self.variables())
        self._set_network()
        submission = self._submission()
        if len(self.hosts) != submission.plan.nodes:
            raise RuntimeError(
                f"The job has {submission.plan.nodes} nodes, but SageMaker started {len(self.hosts)}."
            )
        Layout(self._root, submission).make()
        wait_for_name(self.hosts[0])
        adopt_orphans()
        rank = self.hosts.index(self.host)
        node = NodeProcess(submission, rank, self.hosts[0])
        try:
            if rank == 0:
                return self._supervise(submission, node)
            self._stop.raises = False
            return Agent(submission, rank, node, lambda: self._stop.received).run(self.hosts[0], PORT)
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the job is over, and the rest is quick
            self._keep_records(submission)

    def variables(self) -> dict[str, str]:
        """The variables that scripts for SageMaker read, by the names of its toolkit.

        https://github.com/aws/sagemaker-training-toolkit/blob/master/ENVIRONMENT_VARIABLES.md
        """
        settings, channels = self._config("hyperparameters"), self._config("inputdataconfig")
        given = {name: _value(text) for name, text in settings.items()}
        named = sorted(name for name in channels if name != OWN_CHANNEL)
        root = self._root
        found: dict[str, Any] = {
            "SM_HOSTS": self.hosts,
            "SM_CURRENT_HOST": self.host,
            "SM_CURRENT_HOST_RANK": self.hosts.index(self.host),
            "SM_HOST_COUNT": len(self.hosts),
            "SM_MASTER_ADDR": self.hosts[0],
            "SM_MASTER_PORT": MASTER_PORT,
            "SM_NUM_GPUS": len(list(Path("/dev").glob("nvidia[0-9]*"))),
            "SM_NUM_CPUS": os.cpu_count() or 1,
            "SM_NETWORK_INTERFACE_NAME": self._resources.get("network_interface_name", "eth0"),
            "SM_CURRENT_INSTANCE_TYPE": self._resources.get("current_instance_type", ""),
            "SM_RESOURCE_CONFIG": self._resources,
            "SM_INPUT_DATA_CONFIG": channels,
            "SM_HPS": given,
            "SM_CHANNELS": named,
            "SM_INPUT_DIR": root / "input",
            "SM_INPUT_CONFIG_DIR": root / "input/config",
            "SM_OUTPUT_DIR": root / "output",
            "SM_OUTPUT_DATA_DIR": root / "output/data",
            "SM_MODEL_DIR": root / "model",
            "SM_LOG_LEVEL": logging.INFO,
            **{f"SM_CHANNEL_{name.upper()}": root / "input/data" / name for name in named},
            **{f"SM_HP_{name.upper()}": value for name, value in given.items()},
        }
        return {name: _text(value) for name, value in found.items()}

    def _set_network(self) -> None:
        """Set the interface to the other containers, and the region of the storage."""
        name = self._resources.get("network_interface_name")
        if name and len(self.hosts) > 1:
            for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
                os.environ.setdefault(variable, str(name))
        if "AWS_REGION" in os.environ:  # SageMaker sets this one, and botocore reads the other
            os.environ.setdefault("AWS_DEFAULT_REGION", os.environ["AWS_REGION"])
        os.environ.setdefault("PYTHONUNBUFFERED", "1")

    def _submission(self) -> Submission:
        given = self._root / "input/data" / OWN_CHANNEL / FILE
        if not given.is_file():
            raise FileNotFoundError(
                f"{str(given)!r} is missing: the channel {OWN_CHANNEL!r} must contain it."
            )
        submission = Submission.decode(json.loads(given.read_text()), self._root / "cloudtrain")
        submission.save()
        return submission

    def _supervise(self, submission: Submission, node: NodeProcess) -> tuple[str, str | None]:
        """Run the job to its end, or to the end of these containers."""
        store = JobStore(submission.store)
        gang = ContainerGang(submission, node, PORT)
        state: str = "failed"
        reason: str | None = None
        try:
            gang.meet()
            supervisor = Supervisor(
                submission, store, store.read(submission.id), gang, lambda verdict: review(verdict, gang.lost)
            )
            record = supervisor.run()
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            state, reason = record.state, record.reason
            if supervisor.stop_signal is not None and state == "preempted":
                # Only SageMaker knows whether it starts other machines, or why not.
                try:
                    store.write(record, state="stopping")
                except CloudTrainError as error:
                    logger.error("The record of the job could not be written. %s", error)
            return state, reason
        except BaseException as error:
            state, reason = outcome(error)
            raise
        finally:
            gang.end(state, reason)

    def _keep_records(self, submission: Submission) -> None:
        """Copy what the node wrote about its end to where SageMaker uploads it from."""
        with contextlib.suppress(OSError):
            target = self._root / "output/data/cloudtrain" / self.host
            shutil.copytree(submission.home / "nodes", target, dirs_exist_ok=True)

    def _config(self, name: str) -> dict[str, Any]:
        try:
            found = json.loads((self._root / "input/config" / f"{name}.json").read_text())
        except FileNotFoundError:
            return {}
        if not isinstance(found, dict):
            raise ValueError(f"{name}.json is not a JSON object.")  # noqa: TRY004 - it is a value of a file
        return found


def review(verdict: Verdict, lost: Sequence[int]) -> Verdict:
    """The supervisor's verdict; but a lost container is never restarted: SageMaker ends the job with it."""
    if verdict.state is not None or not lost:
        return verdict
    reason = f"{verdict.reason or ''} The containers of these nodes are gone: {', '.join(map(str, lost))}."
    return dataclasses.replace(verdict, state="failed", reason=reason.strip())


def wait_for_name(host: str, patience: float = PATIENCE) -> None:
    """Return once a host's name resolves. Raises TimeoutError."""
    deadline = time.monotonic() + patience
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(f"The name {host!r} of node 0 does not resolve ({error}).") from error
        time.sleep(PAUSE)


def _value(text: Any) -> Any:
    """A hyperparameter, which SageMaker passes as text: JSON if it parses as JSON."""
    try:
        return json.loads(text)
    except (TypeError, ValueError):
        return text


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True) if isinstance(value, Mapping | list) else str(value)
