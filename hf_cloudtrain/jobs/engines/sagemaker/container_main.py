"""What runs in each container of a SageMaker training job: makes the place that the job expects, and runs its node.

    python -m hf_cloudtrain.jobs.engines.sagemaker.container_main

    /opt/ml/input/config/    resourceconfig.json: the hosts; hyperparameters.json; inputdataconfig.json: the channels
    /opt/ml/input/data/      a folder for each channel; `cloudtrain` has the job and its workspace
    /opt/ml/checkpoints/     kept equal to a folder on S3; the job's checkpoint folder is a link to it
    /opt/ml/model/           what SageMaker packs and uploads at the end; the script's own matter
    /opt/ml/output/failure   why it failed, for DescribeTrainingJob
    /opt/ml/cloudtrain/      the job's home in this container

https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-training-algo-running-container.html

The first container supervises the job, as on every engine (supervisor.py), and the others do what it says
(sagemaker_gang.py). The exit code is 0 after a training that finished, 75 after one that was saved and stopped, and else 1:
SageMaker calls every one but 0 a failure, unless it has stopped the job itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import signal
import socket
import sys
import tarfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported late: until the handler is there, a SIGTERM would be lost
    from hf_cloudtrain.jobs.engines.sagemaker.gang import ContainerGang, NodeProcess
    from hf_cloudtrain.jobs.records import JobRecord, JobStore
    from hf_cloudtrain.jobs.submission import Submission
    from hf_cloudtrain.jobs.verdict import Verdict

logger = logging.getLogger(
    "hf_cloudtrain.jobs.engines.sagemaker.container_main"
)  # as a program its name is another

ROOT = Path("/opt/ml")
MAX_FAILURE = 1024
"""Bytes of the failure that DescribeTrainingJob shows."""
PATIENCE = 300.0
"""Seconds for the name of node 0 to be known. SageMaker says that names may come later than containers."""
PAUSE = 1.0
"""Seconds between two looks for that name."""


def main(root: Path = ROOT) -> int:
    """Run this container's part of the job; gives its exit code."""
    logging.basicConfig(format="cloudtrain: %(message)s", stream=sys.stdout)
    logging.getLogger("hf_cloudtrain").setLevel(logging.INFO)
    # The first process of a container has no default for signals: without a handler they do nothing at all.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _hear)
    try:
        state, reason = Container(root).run()
    except _Left:
        state, reason = "preempted", "Stopped while no command ran."
    except Exception as error:
        if not _is_ours(error):
            logger.exception("This was not expected.")
        state, reason = "failed", str(error) or type(error).__name__
    code = {"finished": 0, "preempted": 75, "cancelled": 75}.get(state, 1)
    if code != 0:
        logger.error("%s: %s", state.capitalize(), reason)
        with contextlib.suppress(OSError):
            write_failure(root, f"{state}: {reason}")
    return code


class Container:
    """One container of a training job.

    Args:
        root: SageMaker's folder.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._resources = self._config("resourceconfig")
        self.host = str(self._resources.get("current_host", "algo-1"))
        # By their names, as SageMaker sorts them: every container must count alike.
        self.hosts = sorted(map(str, self._resources.get("hosts", [self.host])))

    def run(self) -> tuple[str, str | None]:
        """Everything; gives state and reason of the job."""
        from hf_cloudtrain.jobs.engines.sagemaker.gang import PORT, Agent, NodeProcess
        from hf_cloudtrain.runtime.process_tree import adopt_orphans

        os.environ.update(self.variables())
        self._network()
        submission = self._submission()
        if len(self.hosts) != submission.plan.nodes:
            raise RuntimeError(
                f"The job has {submission.plan.nodes} nodes, and SageMaker started {len(self.hosts)}."
            )
        Layout(self._root, submission).make()
        wait_for_name(self.hosts[0])
        adopt_orphans()
        rank = self.hosts.index(self.host)
        node = NodeProcess(submission, rank, self.hosts[0])
        try:
            if rank == 0:
                return self._supervise(submission, node)
            _Told.raises = False
            return Agent(submission, rank, node, lambda: _Told.told).run(self.hosts[0], PORT)
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is over, and what is left takes no time
            self._keep_records(submission)

    def variables(self) -> dict[str, str]:
        """What scripts for SageMaker look for, by the names of its toolkit.

        https://github.com/aws/sagemaker-training-toolkit/blob/master/ENVIRONMENT_VARIABLES.md
        """
        settings, channels = self._config("hyperparameters"), self._config("inputdataconfig")
        given = {name: _value(text) for name, text in settings.items()}
        named = sorted(name for name in channels if name != "cloudtrain")
        root = self._root
        found: dict[str, Any] = {
            "SM_HOSTS": self.hosts,
            "SM_CURRENT_HOST": self.host,
            "SM_CURRENT_HOST_RANK": self.hosts.index(self.host),
            "SM_HOST_COUNT": len(self.hosts),
            "SM_MASTER_ADDR": self.hosts[0],
            "SM_MASTER_PORT": 7777,
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

    def _network(self) -> None:
        """Which way leads to the other containers, and which region the storage is asked in."""
        name = self._resources.get("network_interface_name")
        if name and len(self.hosts) > 1:
            for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
                os.environ.setdefault(variable, str(name))
        if "AWS_REGION" in os.environ:  # SageMaker sets this one, and botocore reads the other
            os.environ.setdefault("AWS_DEFAULT_REGION", os.environ["AWS_REGION"])
        os.environ.setdefault("PYTHONUNBUFFERED", "1")

    def _submission(self) -> Submission:
        from hf_cloudtrain.jobs.submission import FILE, Submission

        given = self._root / "input/data/cloudtrain" / FILE
        if not given.is_file():
            raise FileNotFoundError(f"{str(given)!r} is missing: the channel 'cloudtrain' brings it.")
        submission = Submission.decode(json.loads(given.read_text()), self._root / "cloudtrain")
        submission.save()
        return submission

    def _supervise(self, submission: Submission, node: NodeProcess) -> tuple[str, str | None]:
        """Run the job to its end, or to that of these containers."""
        from hf_cloudtrain.jobs.engines.sagemaker.gang import PORT, ContainerGang
        from hf_cloudtrain.jobs.records import JobStore
        from hf_cloudtrain.jobs.supervisor import Supervisor

        store = JobStore(submission.store)
        gang = ContainerGang(submission, node, PORT)
        state: str = "failed"
        reason: str | None = None
        try:
            gang.meet()
            supervisor = Supervisor(
                submission, store, store.read(submission.id), gang, lambda verdict: review(verdict, gang)
            )
            record = supervisor.run()
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            state, reason = str(record.state), record.reason
            if supervisor.stop_signal is not None and state == "preempted":
                leave_to_sagemaker(store, record)
            return state, reason
        except _Left:
            state, reason = "preempted", "Stopped while no command ran."
            raise
        except Exception as error:
            reason = str(error)
            raise
        finally:
            gang.end(state, reason)

    def _keep_records(self, submission: Submission) -> None:
        """What the node wrote of its end, to where SageMaker uploads it from."""
        with contextlib.suppress(OSError):
            target = self._root / "output/data/cloudtrain" / self.host
            shutil.copytree(submission.home / "nodes", target, dirs_exist_ok=True)

    def _config(self, name: str) -> dict[str, Any]:
        try:
            found = json.loads((self._root / "input/config" / f"{name}.json").read_text())
        except FileNotFoundError:
            return {}
        if not isinstance(found, dict):
            raise ValueError(f"{name}.json is no JSON object.")  # noqa: TRY004 - it is a value of a file
        return found


def review(verdict: Verdict, gang: ContainerGang) -> Verdict:
    """The supervisor's verdict, but that nobody starts a container again: SageMaker ends the job with the first of them."""
    if verdict.state is not None or not gang.lost:
        return verdict
    names = ", ".join(map(str, gang.lost))
    reason = f"{verdict.reason or ''} The containers of these nodes are gone: {names}."
    return dataclasses.replace(verdict, state="failed", reason=reason.strip())


def leave_to_sagemaker(store: JobStore, record: JobRecord) -> None:
    """Record that SageMaker has stopped these machines: it alone knows whether it starts others, or why not."""
    from hf_cloudtrain.errors import CloudTrainError

    try:
        store.write(record, state="stopping")
    except CloudTrainError as error:
        logger.error("The record of the job could not be written. %s", error)


class Layout:
    """Workspace, checkpoint folder and dataset at the paths where the job expects them.

    By links: a container of SageMaker may mount nothing, and its file system is the job's alone.
    """

    def __init__(self, root: Path, submission: Submission) -> None:
        self._root = root
        self._submission = submission

    def make(self) -> None:
        """Make all of it. Raises OSError, ConfigurationError, CorruptCheckpointError."""
        self._workspace()
        self._checkpoints()
        self._dataset()

    def _workspace(self) -> None:
        submission = self._submission
        target = Path(submission.job.job_setting.workspace.mount_path)
        if not submission.has_workspace and target.is_dir() and any(target.iterdir()):
            _link(str(submission.workspace), target)  # the image has brought its own
            return
        submission.workspace.mkdir(parents=True, exist_ok=True)
        if submission.has_workspace:
            unpack(self._channel("cloudtrain") / _names()[0], submission.workspace)
        _link(str(target), submission.workspace)

    def _checkpoints(self) -> None:
        folder = self._submission.job.checkpoint_dir
        real = self._root / "checkpoints"
        if folder is None:
            return
        real.mkdir(parents=True, exist_ok=True)
        # SageMaker has brought copies of our own records of uploads, too: none of them is the file that it was.
        for left in list(real.rglob(".cloudtrain")):
            shutil.rmtree(left, ignore_errors=True)
        place = Path(folder)
        if place.resolve() != real.resolve() and place.is_dir() and any(place.iterdir()):
            logger.warning("%r holds something already, so SageMaker does not keep it; the run does.", folder)
        else:
            _link(folder, real)

    def _dataset(self) -> None:
        from hf_cloudtrain.checkpoints.download import is_whole
        from hf_cloudtrain.checkpoints.manifest import Manifest
        from hf_cloudtrain.errors import CorruptCheckpointError

        data = self._submission.job.data
        if data is None:
            return
        record = (self._channel("cloudtrain") / _names()[1]).read_bytes()
        manifest = Manifest.parse(record, str(json.loads(record)["key"]))
        folder = self._channel("dataset")
        if not is_whole(folder, manifest):
            raise CorruptCheckpointError(
                f"What SageMaker brought of the dataset {data.name!r} is not what was stored. "
                "Run the job again, or `cloudtrain data create` it anew."
            )
        logger.info("Dataset %r at %s.", data.name, data.mount_path)
        _link(data.mount_path, folder)

    def _channel(self, name: str) -> Path:
        return self._root / "input/data" / name


def _link(target: str, source: Path) -> None:
    from hf_cloudtrain.jobs.node.mounts import Mount, link

    link([Mount(source, target)])


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a workspace. Links that lead out of it are left out: what they lead to is on another machine."""
    if not hasattr(tarfile, "data_filter"):
        raise RuntimeError(
            "This Python unpacks archives unsafely. Use 3.10.12, 3.11.4 or newer in the image."
        )

    def inside(member: tarfile.TarInfo, place: str) -> tarfile.TarInfo | None:
        try:
            return tarfile.data_filter(member, place)
        except (tarfile.AbsoluteLinkError, tarfile.LinkOutsideDestinationError):
            logger.warning("%r leads out of the workspace and is left out.", member.name)
            return None

    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter=inside)  # noqa: S202 - `inside` looks at each member


def wait_for_name(host: str, patience: float = PATIENCE) -> None:
    """Return once a host's name is known. Raises TimeoutError."""
    deadline = time.monotonic() + patience
    while True:
        try:
            socket.getaddrinfo(host, None)
        except OSError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(f"The name {host!r} of node 0 is not known ({error}).") from error
            time.sleep(PAUSE)
        else:
            return


def write_failure(root: Path, text: str) -> None:
    """Say why, where SageMaker reads it."""
    from hf_cloudtrain.runtime.redaction import redact, secrets_of_environment

    (root / "output").mkdir(parents=True, exist_ok=True)
    shown = redact(text, secrets_of_environment())
    # Cut between two characters.
    whole = shown.encode()[:MAX_FAILURE].decode(errors="ignore")
    (root / "output/failure").write_text(whole, encoding="utf-8")


class _Left(BaseException):
    """Told to stop while nothing ran that hears it."""


class _Told:
    """What the signals have said."""

    told = False
    raises = True
    """Whether the first one ends whatever goes on. A container that follows another one looks at `told` instead."""


def _hear(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signature of handlers
    if not _Told.told:
        _Told.told = True
        if _Told.raises:
            raise _Left


def _names() -> tuple[str, str]:
    from hf_cloudtrain.jobs.engines.sagemaker.request import DATASET, WORKSPACE

    return WORKSPACE, DATASET


def _is_ours(error: Exception) -> bool:
    from hf_cloudtrain.errors import CloudTrainError

    return isinstance(error, CloudTrainError | OSError)


def _value(text: Any) -> Any:
    """A hyperparameter, which SageMaker hands over as text: JSON where it reads as that."""
    try:
        return json.loads(text)
    except (TypeError, ValueError):
        return text


def _text(value: Any) -> str:
    if isinstance(value, Mapping | list):
        return json.dumps(value, sort_keys=True)
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
