"""What runs in each container of a SageMaker training job: makes the place that the job expects, and runs its node.

    python -m hf_cloudtrain.engines.sagemaker_entry

    /opt/ml/input/config/    resourceconfig.json: the hosts; hyperparameters.json; inputdataconfig.json: the channels
    /opt/ml/input/data/      a folder for each channel; `cloudtrain` has the job and its workspace
    /opt/ml/checkpoints/     kept equal to a folder on S3; the job's checkpoint folder is a link to it
    /opt/ml/model/           what SageMaker packs and uploads at the end; the script's own matter
    /opt/ml/output/failure   why it failed, for DescribeTrainingJob
    /opt/ml/cloudtrain/      the job's home in this container

https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-training-algo-running-container.html
The exit code is 0 after a training that finished, 75 after one that was saved and stopped, and else 1: SageMaker calls
every one but 0 a failure, unless it has stopped the job itself.
"""

from __future__ import annotations

import contextlib
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
    from hf_cloudtrain.submission import Submission
    from hf_cloudtrain.supervisor import Verdict

logger = logging.getLogger("hf_cloudtrain.engines.sagemaker_entry")  # as a program its name is another

ROOT = Path("/opt/ml")
PORT = 7777
"""Where node 0 listens, as SageMaker's own toolkit has it."""
MAX_FAILURE = 1024
"""Bytes of the failure that DescribeTrainingJob shows."""
PATIENCE = 300.0
"""Seconds for the name of node 0 to be known. SageMaker says that names may come later than containers."""
PAUSE, LONGEST_PAUSE = 1.0, 60.0
"""Seconds before a command that crashed is started again: doubled each time."""


def main(root: Path = ROOT) -> int:
    """Run this container's part of the job; gives its exit code."""
    logging.basicConfig(format="cloudtrain: %(message)s", stream=sys.stdout)
    logging.getLogger("hf_cloudtrain").setLevel(logging.INFO)
    # The first process of a container has no default for signals: without a handler they do nothing at all.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)
    try:
        state, reason, code = Container(root).run()
    except _Left:
        state, reason, code = "preempted", "Stopped while no command ran.", 75
    except Exception as error:
        if not _is_ours(error):
            logger.exception("This was not expected.")
        state, reason, code = "failed", str(error) or type(error).__name__, 1
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

    def run(self) -> tuple[str, str, int]:
        """Everything; gives state, reason and exit code."""
        for name, value in self.variables().items():
            os.environ[name] = value
        self._network()
        submission = self._submission()
        if len(self.hosts) != submission.plan.nodes:
            raise RuntimeError(
                f"The job has {submission.plan.nodes} nodes, and SageMaker started {len(self.hosts)}."
            )
        Layout(self._root, submission).make()
        wait_for_name(self.hosts[0])
        try:
            verdict = self._train(submission)
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is over, and what is left takes no time
            self._keep_records(submission)
        state = verdict.state or ("failed" if verdict.is_crash else "preempted")
        code = {"finished": 0, "preempted": 75, "cancelled": 75}.get(state, 1)
        return state, verdict.reason or state, code

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
            "SM_MASTER_PORT": PORT,
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
        from hf_cloudtrain.submission import FILE, Submission

        given = self._root / "input/data/cloudtrain" / FILE
        if not given.is_file():
            raise FileNotFoundError(f"{str(given)!r} is missing: the channel 'cloudtrain' brings it.")
        submission = Submission.decode(json.loads(given.read_text()), self._root / "cloudtrain")
        submission.save()
        return submission

    def _train(self, submission: Submission) -> Verdict:
        """Run the node; where it is alone, again after a crash. Several nodes cannot agree on that here."""
        start = 1
        while True:
            verdict = self._start(submission, start)
            if not verdict.is_crash or len(self.hosts) > 1 or start > submission.job.max_restarts:
                return verdict
            logger.warning("%s The command is started again.", verdict.reason)
            time.sleep(min(PAUSE * 2 ** (start - 1), LONGEST_PAUSE))
            start += 1

    def _start(self, submission: Submission, start: int) -> Verdict:
        import dataclasses

        from hf_cloudtrain.node import run_node
        from hf_cloudtrain.outcome import read_end
        from hf_cloudtrain.supervisor import judge

        rank = self.hosts.index(self.host)
        # The dataset is there already, and so are the links: nothing is downloaded, and nothing mounted.
        job = submission.job.model_copy(update={"data": None})
        status = run_node(
            dataclasses.replace(submission, job=job),
            node_rank=rank,
            master_addr=self.hosts[0],
            master_port=PORT,
            start=start,
            wrap=lambda _, mounts, command: command,
        )
        codes = [status if other == rank else 0 for other in range(len(self.hosts))]
        stopped = (read_end(submission.node_file(rank, start)) or {}).get("stopped")
        verdict = judge(submission, start, codes, "SageMaker" if stopped else None)
        if stopped and rank > 0 and verdict.state == "preempted":
            # What was saved is known on the node of rank 0.
            return dataclasses.replace(verdict, reason="Stopped by SageMaker. Node 0 says what was saved.")
        return verdict

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
        from hf_cloudtrain.downloader import is_whole
        from hf_cloudtrain.errors import CorruptCheckpointError
        from hf_cloudtrain.manifest import Manifest

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
    from hf_cloudtrain.mounts import Mount, link

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
            socket.getaddrinfo(host, PORT)
        except OSError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(f"The name {host!r} of node 0 is not known ({error}).") from error
            time.sleep(PAUSE)
        else:
            return


def write_failure(root: Path, text: str) -> None:
    """Say why, where SageMaker reads it."""
    from hf_cloudtrain.redaction import redact, secrets_of_environment

    (root / "output").mkdir(parents=True, exist_ok=True)
    shown = redact(text, secrets_of_environment())
    # Cut between two characters.
    whole = shown.encode()[:MAX_FAILURE].decode(errors="ignore")
    (root / "output/failure").write_text(whole, encoding="utf-8")


class _Left(BaseException):
    """Told to stop while no command ran; while one does, the node hears it."""


_heard: list[int] = []


def _leave(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signature of handlers
    if not _heard:
        _heard.append(number)
        raise _Left


def _names() -> tuple[str, str]:
    from hf_cloudtrain.engines.sagemaker_request import DATASET, WORKSPACE

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
