"""What happens on each node of a job, the same on every engine.

    python -m hf_cloudtrain.jobs.node.node HOME --master-addr localhost --master-port 29500 --start 1 --node-rank 0

    dataset -> newest checkpoint -> mounts -> setup -> command -> outcome

The job's own variables are in the environment already. SIGTERM, SIGUSR1, SIGUSR2 and Ctrl-C stop the command with the
job's grace; whatever it has started is gone when this process ends. The exit code is 0 after a training that finished,
75 after one that was saved and stopped, and else 1; `Submission.node_file` says more.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import posixpath
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
from hf_cloudtrain.checkpoints.in_place import InPlaceCheckpointer
from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.datasets.cache import alone
from hf_cloudtrain.datasets.store import DatasetStore
from hf_cloudtrain.errors import CloudTrainError, ConfigurationError, NoDatasetError, PreemptedExit
from hf_cloudtrain.jobs.node.mounts import Mount, argv, docker_argv, has_docker
from hf_cloudtrain.jobs.node.stopping import MARGIN, stop_handler
from hf_cloudtrain.jobs.spec.node_plan import CONTRACT
from hf_cloudtrain.jobs.submission import Submission
from hf_cloudtrain.runtime.files import locked
from hf_cloudtrain.runtime.process_tree import adopt_orphans, kill_children, terminate
from hf_cloudtrain.storage.backends import is_local, local_path
from hf_cloudtrain.tracking.exit_record import read_end

logger = logging.getLogger(__name__)

POLL = 0.1
"""Seconds between two looks at the command."""
BY_FRAMEWORK = {"trainer_state.json", "training_state.json"}
"""Files of a `Trainer`'s and a `TrainLoop`'s checkpoint, which is a folder of its own below the checkpoint folder."""
SHELL = """\
trap 'stopped=1' TERM INT USR1 USR2
trap '[ -z "$stopped" ] || exit 75' DEBUG
"""
"""Before a command: bash waits for what the signal is meant for, and does not begin anything after it."""

HANDED_ON = ("HF_", "AWS_", "GOOGLE_", "AZURE_", "NCCL_", "WANDB_")
"""Variables of the machine that a container gets besides the job's: its PATH and HOME are the image's."""

Wrap = Callable[[Submission, Sequence[Mount], list[str]], list[str]]


@dataclass(frozen=True)
class Ending:
    """How a node's part of one start ended."""

    exit_code: int | None
    """Of the command; negative: a signal. None where it was not started."""
    outcome: str | None
    """What the script said in its exit file."""
    problem: str | None = None
    """Why the command could not be started."""
    hopeless: bool = False
    """Whether another start would have the same problem."""
    stopped: bool = False
    """Whether the node was told to stop."""

    @property
    def status(self) -> int:
        """Exit code of the node."""
        if self.outcome == "finished" or (self.outcome is None and self.exit_code == 0 and not self.stopped):
            return 0
        if self.outcome in ("preempted", "stopped") or (self.stopped and self.outcome is None):
            return PreemptedExit.CODE
        return 1


class Node:
    """One node of one start of a job. Arguments as `run_node`."""

    def __init__(
        self,
        submission: Submission,
        node_rank: int,
        master_addr: str,
        master_port: int,
        start: int,
        wrap: Wrap,
    ) -> None:
        self._submission = submission
        self._rank = node_rank
        self._address = (master_addr, master_port)
        self._start = start
        self._wrap = wrap
        self._stopped_at: float | None = None
        self._can_interrupt = False
        """Whether a signal may break off what the main thread does."""
        self._parent = os.getppid()

    def run(self) -> Ending:
        """Everything, from the dataset to the outcome."""
        forget_launcher(self._submission.plan.variables)
        adopt_orphans()
        with stop_handler(self._hear):
            ending = self._run_until_ended()
        self._record(ending)
        return ending

    def _run_until_ended(self) -> Ending:
        try:
            self._can_interrupt = True
            self._check_not_stopped()
            # A node whose supervisor was killed may still be saving: what it saves is what this one resumes from.
            with locked(self._submission.node_file(self._rank, 0).with_name("lock"), self._patience):
                exit_code = self._work()
            return Ending(exit_code, self._outcome(), stopped=self._stopped_at is not None)
        except _Stopped:
            return Ending(None, None, stopped=True)
        except (CloudTrainError, OSError) as error:
            logger.error("%s", error)
            hopeless = isinstance(error, (ConfigurationError, NoDatasetError))
            return Ending(None, None, str(error), hopeless, stopped=self._stopped_at is not None)
        finally:
            self._can_interrupt = False
            kill_children()

    @property
    def _patience(self) -> float:
        """Seconds in which a node that was told to stop has ended."""
        return self._submission.plan.grace + 3 * MARGIN

    def _work(self) -> int:
        submission = self._submission
        exit_file = submission.exit_file(self._rank, self._start)
        exit_file.parent.mkdir(parents=True, exist_ok=True)
        exit_file.unlink(missing_ok=True)
        mounts = list(self._mounts())
        environment = {**os.environ, **self._contract(exit_file), **self._restore()}
        command = submission.job.command
        folder = submission.job.job_setting.workspace.mount_path
        if not any(mount.target == folder for mount in mounts):
            folder = str(submission.workspace)
        if command.setup is not None:
            self._set_up(command.setup, mounts, folder, environment)
        return self._call(command.run, mounts, folder, environment)

    def _contract(self, exit_file: Path) -> dict[str, str]:
        address, port = self._address
        return self._submission.plan.environment(
            self._rank,
            master_addr=address,
            master_port=port,
            run_url=self._submission.run_url,
            exit_file=str(exit_file),
            shell=os.environ,
        )

    def _mounts(self) -> list[Mount]:
        return [*folder_mounts(self._submission), *self._data()]

    def _data(self) -> list[Mount]:
        data = self._submission.job.data
        if data is None:
            return []
        store = DatasetStore(self._submission.store)
        name = data.name.partition("@")[0]
        dataset = store.find(name, self._submission.dataset_version)
        logger.info("Dataset %s at %s.", dataset, data.mount_path)
        return [Mount(store.local_copy(dataset), data.mount_path, read_only=True)]

    def _restore(self) -> dict[str, str]:
        """Put the newest checkpoint where the script expects it, and what to tell the script of that."""
        folder = real_checkpoint_dir(self._submission)
        if folder is None:
            return {}
        chosen = self._submission.restored_file(self._start)
        with alone(self._submission.home / "restore.lock", "restores the checkpoint"):
            key = restore(self._submission.run_url, folder, chosen)
        return {env.RESTORED_CHECKPOINT: str(key)} if key else {}

    def _set_up(self, text: str, mounts: Sequence[Mount], folder: str, environment: dict[str, str]) -> None:
        """Once on each machine and start, whatever number of nodes it stands for."""
        done = self._submission.home / f"setup-{platform.node()}"
        with alone(done.with_suffix(".lock"), "prepares this machine"):
            if done.exists() and done.read_text() == str(self._start):
                return
            code = self._call(text, mounts, folder, environment)
            self._check_not_stopped()
            if code != 0:
                raise CloudTrainError(f"The setup of the job ended with exit code {code}.")
            done.write_text(str(self._start))

    def _call(self, text: str, mounts: Sequence[Mount], folder: str, environment: dict[str, str]) -> int:
        self._check_not_stopped()
        bash = ["bash", "-c", f"cd -- {shlex.quote(folder)} || exit 1\n{SHELL}{text}\n"]
        wrapped = self._wrap(self._submission, mounts, bash)
        process = subprocess.Popen(wrapped, env=environment, stdin=subprocess.DEVNULL)
        self._can_interrupt = False
        told = False
        while process.poll() is None:
            if os.getppid() != self._parent and self._stopped_at is None:
                logger.warning("Whoever watched over this node is gone, so it stops.")
                self._stopped_at = time.monotonic()
            if self._stopped_at is not None:
                if not told:
                    terminate(process.pid)
                    told = True
                if time.monotonic() > self._stopped_at + self._submission.plan.grace + MARGIN:
                    logger.warning("The command did not end within its grace, so it is killed.")
                    kill_children()
            time.sleep(POLL)
        self._can_interrupt = True
        kill_children()
        if wrapped[0] == "docker":  # a client that was killed leaves its container
            subprocess.run(
                ["docker", "kill", container_name(self._submission)], capture_output=True, check=False
            )
        return process.returncode

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._stopped_at is None:
            self._stopped_at = time.monotonic()
            if self._can_interrupt:
                raise _Stopped

    def _check_not_stopped(self) -> None:
        if self._stopped_at is not None:
            raise _Stopped

    def _outcome(self) -> str | None:
        found = read_end(self._submission.exit_file(self._rank, self._start))
        return None if found is None else str(found.get("outcome"))

    def _record(self, ending: Ending) -> None:
        path = self._submission.node_file(self._rank, self._start)
        beside = path.with_name(f".{path.name}")
        record = {
            "exit_code": ending.exit_code,
            "problem": ending.problem,
            "hopeless": ending.hopeless,
            "stopped": ending.stopped,
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_text(json.dumps(record) + "\n")
            os.replace(beside, path)
        except OSError as error:
            logger.error("%s", error)


class _Stopped(BaseException):
    """The node was told to stop before its command ran."""


def run_node(
    submission: Submission,
    *,
    node_rank: int,
    master_addr: str,
    master_port: int,
    start: int,
    wrap: Wrap | None = None,
) -> int:
    """Do one node's part of a start of a job; gives its exit code. On the main thread of a process.

    Args:
        node_rank: 0 to `nodes` - 1.
        master_addr: host of node 0, as the other nodes reach it.
        master_port: port on it that is free.
        start: number of the start, from 1.
        wrap: gives the command line under which a command sees the mounts; default: a mount namespace, or docker.
    """
    node = Node(submission, node_rank, master_addr, master_port, start, wrap or in_namespace_or_docker)
    return node.run().status


def in_namespace_or_docker(submission: Submission, mounts: Sequence[Mount], command: list[str]) -> list[str]:
    """The command line under which `command` sees the mounts: in the job's image where docker is here."""
    image = submission.job.job_setting.docker.image
    if image is not None and has_docker():
        names = [name for name in os.environ if name.startswith(HANDED_ON)]
        mounts = [*mounts, *_mounts_as_they_are(submission)]
        for mount in mounts:
            mount.source.mkdir(parents=True, exist_ok=True)  # docker mounts nothing that is not there
        return docker_argv(
            image,
            mounts,
            command,
            {*names, *CONTRACT, *submission.plan.variables},
            submission.home,
            name=container_name(submission),
        )
    return argv(mounts, command)


def container_name(submission: Submission) -> str:
    """Name of the container of this node."""
    return f"cloudtrain-{submission.id}-{os.getpid()}"


def _mounts_as_they_are(submission: Submission) -> Iterator[Mount]:
    """What a command writes to at the machine's own paths: a container would lose it."""
    run = submission.run_url
    if is_local(run):
        yield Mount(Path(local_path(run)), local_path(run))
    folder, real = submission.job.checkpoint_dir, real_checkpoint_dir(submission)
    if folder is not None and real == Path(folder):
        yield Mount(real, folder)


def forget_launcher(own: Container[str]) -> None:
    """Take out of the environment what another launcher or job has left there: we are no rank of it.

    A shell that torchrun has started, or in which somebody has set `PET_RDZV_BACKEND`, would have torchrun wait for
    machines that never come.

    Args:
        own: the job's own variables, which stay.
    """
    for variable in list(os.environ):
        theirs = variable in CONTRACT or variable.startswith(("PET_", "TORCHELASTIC_"))
        if theirs and variable not in own:
            del os.environ[variable]


def folder_mounts(submission: Submission) -> list[Mount]:
    """Workspace and checkpoint folder, where they are not what they are called."""
    target = submission.job.job_setting.workspace.mount_path
    below = [submission.job.checkpoint_dir, submission.job.data.mount_path if submission.job.data else None]
    mounts = []
    if submission.has_workspace or any(path and _is_below(path, target) for path in below):
        mounts.append(Mount(submission.workspace, target))
    folder, real = submission.job.checkpoint_dir, real_checkpoint_dir(submission)
    if folder is not None and real is not None and real == submission.home / "checkpoint":
        mounts.append(Mount(real, folder))
    return mounts


def real_checkpoint_dir(submission: Submission) -> Path | None:
    """Where the checkpoint folder of a job is on this disk; None where the job names none."""
    folder = submission.job.checkpoint_dir
    if folder is None:
        return None
    target = submission.job.job_setting.workspace.mount_path
    if _is_below(folder, target):
        return submission.workspace / posixpath.relpath(folder, target)
    parent = os.path.dirname(folder)
    # A disk that is there for it; the root folder of the machine is none, although root may write there.
    if os.path.isdir(folder) or (parent != "/" and os.access(parent, os.W_OK)):
        return Path(folder)
    return submission.home / "checkpoint"


def restore(run_url: str, folder: Path, chosen: Path) -> CheckpointKey | None:
    """Bring the newest checkpoint of a run into a folder; None where there is none.

    That of a `Trainer` or a `TrainLoop` is a folder below it; any other one is the folder itself.

    Args:
        chosen: file with the choice of the first node that is here; the others take the same.
    """
    catalog = Catalog(Checkpointer(run_url, folder).storage)
    if chosen.exists():
        key = _key_in(chosen)
        if key is not None:
            _kind(catalog, key)(run_url, folder).fetcher(catalog.read(key))()
        return key
    newest = catalog.newest()
    kind = Checkpointer if newest is None else _kind(catalog, newest)
    checkpointer = kind(run_url, folder)
    try:
        restored = checkpointer.restore()
    finally:
        checkpointer.close()
    key = None if restored is None else CheckpointKey(restored.manifest.attempt, restored.manifest.step)
    chosen.parent.mkdir(parents=True, exist_ok=True)
    chosen.write_text(json.dumps(None if key is None else [key.attempt, key.step]))
    return key


def node_argv(
    home: Path, master_addr: str, master_port: int, start: int, module: str = "hf_cloudtrain.jobs.node.node"
) -> list[str]:
    """The command line of one start's nodes, all but its last part: the rank."""
    return [
        *(sys.executable, "-m", module, str(home), "--master-addr", master_addr),
        *("--master-port", str(master_port), "--start", str(start), "--node-rank"),
    ]


def main(prepare: Callable[[Submission], Submission] | None = None, wrap: Wrap | None = None) -> None:
    """The command line above.

    Args:
        prepare: changes the submission for the machine that the node runs on.
        wrap: as `run_node`.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("home")
    parser.add_argument("--node-rank", type=int, required=True)
    parser.add_argument("--master-addr", required=True)
    parser.add_argument("--master-port", type=int, required=True)
    parser.add_argument("--start", type=int, required=True)
    given = vars(parser.parse_args())
    logging.basicConfig(level=logging.INFO, format="cloudtrain: %(message)s")
    submission = Submission.load(given.pop("home"))
    sys.exit(run_node(prepare(submission) if prepare else submission, **given, wrap=wrap))


def _kind(catalog: Catalog, key: CheckpointKey) -> type[Checkpointer]:
    by_framework = BY_FRAMEWORK & {file.path for file in catalog.read(key).files}
    return Checkpointer if by_framework else InPlaceCheckpointer


def _key_in(chosen: Path) -> CheckpointKey | None:
    found = json.loads(chosen.read_text())
    return None if found is None else CheckpointKey(*found)


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


if __name__ == "__main__":
    main()
