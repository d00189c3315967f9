"""The program on each node of a job, the same on every engine.

    python -m hf_cloudtrain.jobs.node.node HOME --master-addr localhost --master-port 29500 --start 1 --node-rank 0

    dataset -> newest checkpoint -> mounts -> setup -> command -> outcome

The job's own variables are in the environment already. SIGTERM, SIGHUP, SIGUSR1, SIGUSR2 and Ctrl-C stop the command,
which has the job's grace to save; all processes below this one are gone when it exits. The exit code is 0 if the training
finished, 75 if it saved and stopped, and 1 otherwise; the file `Submission.node_file` has the details.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import logging
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from types import FrameType

from hf_cloudtrain import env
from hf_cloudtrain.datasets.cache import exclusive
from hf_cloudtrain.datasets.store import DatasetStore
from hf_cloudtrain.errors import CloudTrainError, ConfigurationError, NoDatasetError, PreemptedExit
from hf_cloudtrain.jobs.logs import show_messages
from hf_cloudtrain.jobs.node.docker import container_name, in_namespace_or_docker
from hf_cloudtrain.jobs.node.folders import folder_mounts, real_checkpoint_dir
from hf_cloudtrain.jobs.node.mounts import Mount
from hf_cloudtrain.jobs.node.restore import move_newer, restore
from hf_cloudtrain.jobs.node.stopping import MARGIN, stop_handler
from hf_cloudtrain.jobs.spec.node_plan import CONTRACT, periflow_variables
from hf_cloudtrain.jobs.submission import Submission
from hf_cloudtrain.launch.notes import read_notes, why_nothing
from hf_cloudtrain.runtime.files import locked
from hf_cloudtrain.runtime.process_tree import adopt_orphans, await_orphans, kill_children, terminate
from hf_cloudtrain.staging.process import PROGRAM
from hf_cloudtrain.tracking.exit_record import read_end

logger = logging.getLogger(__name__)

POLL = 0.1
"""Seconds between two looks at the command."""
SHELL = """\
trap 'stopped=1' TERM INT HUP USR1 USR2
trap '[ -z "$stopped" ] || exit 75' DEBUG
"""
"""Runs before a command: after a stop signal bash waits for the program that saves, and starts nothing after it."""

Wrap = Callable[[Submission, Sequence[Mount], list[str]], list[str]]


@dataclasses.dataclass(frozen=True)
class Ending:
    """How a node's part of one start ended."""

    exit_code: int | None
    """Exit code of the command, negative for a signal; None if it was not started."""
    outcome: str | None
    """The outcome in the script's exit file."""
    problem: str | None = None
    """Why the command could not be started."""
    hopeless: bool = False
    """Whether a restart would have the same problem."""
    stopped: bool = False
    """Whether the node was asked to stop."""

    @property
    def status(self) -> int:
        """Exit code of the node."""
        if self.outcome == "finished" or (self.outcome is None and self.exit_code == 0 and not self.stopped):
            return 0
        if self.outcome in ("preempted", "stopped") or (self.stopped and self.outcome is None):
            return PreemptedExit.CODE
        return 1


@dataclasses.dataclass
class Node:
    """One node in one start of a job. Arguments as `run_node`."""

    submission: Submission
    rank: int
    master_addr: str
    master_port: int
    start: int
    wrap: Wrap
    _stopped_at: float | None = None
    _can_interrupt: bool = False
    """Whether a stop signal may interrupt the main thread."""

    def run(self) -> Ending:
        """Everything, from the dataset to the outcome."""
        self._parent = os.getppid()
        forget_launcher(self.submission.plan.variables)
        adopt_orphans()
        with stop_handler(self._on_signal):
            ending = self._run_until_ended()
        self._record(ending)
        return ending

    def _run_until_ended(self) -> Ending:
        try:
            self._can_interrupt = True
            self._check_not_stopped()
            # A node whose supervisor was killed may still be saving: this one resumes from what it saves.
            lock = self.submission.node_file(self.rank, 0).with_name("lock")
            with locked(lock, patience=self.submission.plan.grace + 3 * MARGIN):
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

    def _work(self) -> int:
        submission = self.submission
        exit_file = submission.exit_file(self.rank, self.start)
        exit_file.parent.mkdir(parents=True, exist_ok=True)
        exit_file.unlink(missing_ok=True)
        mounts = [*folder_mounts(submission), *self._data()]
        environment = {**os.environ, **self._restored(), **self._contract(exit_file)}
        notes = environment.get(env.LAUNCH_NOTES)
        if notes is not None:
            Path(notes).write_bytes(b"")
        folder = submission.job.job_setting.workspace.mount_path
        if not any(mount.target == folder for mount in mounts):
            folder = str(submission.workspace)
        folder = str(Path(folder, submission.code))
        call = functools.partial(self._call, mounts=mounts, folder=folder, environment=environment)
        if submission.job.command.setup is not None:
            self._set_up(functools.partial(call, submission.job.command.setup))
        code = call(submission.job.command.run)
        reason = None if notes is None else why_nothing(read_notes(notes))
        if reason is not None and self._outcome() is None:  # no script has used the package itself
            logger.warning("`launch: auto` has hooked no training on this node: %s.", reason)
        return code

    def _contract(self, exit_file: Path) -> dict[str, str]:
        return self.submission.plan.environment(
            self.rank,
            master_addr=self.master_addr,
            master_port=self.master_port,
            run_url=self.submission.run_url,
            exit_file=str(exit_file),
            shell=os.environ,
        )

    def _data(self) -> list[Mount]:
        data = self.submission.job.data
        if data is None:
            return []
        store = DatasetStore(self.submission.store)
        name = data.name.partition("@")[0]
        dataset = store.find(name, self.submission.dataset_version)
        logger.info("Dataset %s at %s.", dataset, data.mount_path)
        return [Mount(store.local_copy(dataset), data.mount_path, read_only=True)]

    def _restored(self) -> dict[str, str]:
        """Put the newest checkpoint where the script expects it; gives the variables that say so, PeriFlow's too."""
        folder, seen = real_checkpoint_dir(self.submission), self.submission.job.checkpoint_dir
        if folder is None or seen is None:
            return periflow_variables(None, 0)
        choice = self.submission.restored_file(self.start)
        with exclusive(self.submission.home / "restore.lock", "is restoring the checkpoint"):
            key = restore(self.submission.run_url, folder, choice, lambda: self._start_over(folder))
        found = periflow_variables(seen, key.step if key else 0)
        return {**found, env.RESTORED_CHECKPOINT: str(key)} if key else found

    def _start_over(self, folder: Path) -> None:
        """Move away what an earlier start has written: it was killed before its first checkpoint, so it began at step 0.

        Scripts load what is in the folder. Files that the user has put there stay, and so does a folder of the user's own.
        """
        home, first = self.submission.home, self.submission.restored_file(1)
        if self.start > 1 and first.exists() and folder.is_relative_to(home):
            move_newer(folder, home / "left-over", first.stat().st_mtime_ns)

    def _set_up(self, call: Callable[[], int]) -> None:
        """Run the setup once in each start on each machine, which may have several nodes."""
        done = self.submission.home / f"setup-{platform.node()}"
        with exclusive(done.with_suffix(".lock"), "is preparing this machine"):
            if done.exists() and done.read_text() == str(self.start):
                return
            code = call()
            self._check_not_stopped()
            if code != 0:
                # 126 and 127: a program cannot be executed, or was not found; it will not be at the next start either.
                kind = ConfigurationError if code in (126, 127) else CloudTrainError
                raise kind(f"The setup of the job ended with exit code {code}.")
            done.write_text(str(self.start))

    def _call(self, text: str, mounts: Sequence[Mount], folder: str, environment: dict[str, str]) -> int:
        self._check_not_stopped()
        bash = ["bash", "-c", f"cd -- {shlex.quote(folder)} || exit 1\n{SHELL}{text}\n"]
        wrapped = self.wrap(self.submission, mounts, bash)
        process = subprocess.Popen(wrapped, env=environment, stdin=subprocess.DEVNULL)
        self._can_interrupt = False
        is_asked = False
        while process.poll() is None:
            if os.getppid() != self._parent and self._stopped_at is None:
                logger.warning("The supervisor process exited; stopping this node.")
                self._stopped_at = time.monotonic()
            if self._stopped_at is not None:
                if not is_asked:
                    is_asked = True
                    terminate(process.pid)
                if time.monotonic() > self._stopped_at + self.submission.plan.grace + MARGIN:
                    logger.warning("The command did not exit within its grace time; killing it.")
                    kill_children()
            time.sleep(POLL)
        # The writer of a killed training still stores what was saved last.
        ended = time.monotonic()
        limit = self.submission.plan.grace + MARGIN
        await_orphans(PROGRAM, lambda: time.monotonic() > (self._stopped_at or ended) + limit)
        self._can_interrupt = True
        kill_children()
        if wrapped[0] == "docker":  # a killed client leaves its container behind
            kill = ["docker", "kill", container_name(self.submission)]
            subprocess.run(kill, capture_output=True, check=False)
        return process.returncode

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._stopped_at is None:
            self._stopped_at = time.monotonic()
            if self._can_interrupt:
                raise _Stopped

    def _check_not_stopped(self) -> None:
        if self._stopped_at is not None:
            raise _Stopped

    def _outcome(self) -> str | None:
        found = (read_end(self.submission.exit_file(self.rank, self.start)) or {}).get("outcome")
        return None if found is None else str(found)

    def _record(self, ending: Ending) -> None:
        path = self.submission.node_file(self.rank, self.start)
        beside = path.with_name(f".{path.name}")
        record = dataclasses.asdict(ending)
        del record["outcome"]  # it is in the exit file
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_text(json.dumps(record) + "\n")
            os.replace(beside, path)
        except OSError as error:
            logger.error("%s", error)


class _Stopped(BaseException):
    """The node was asked to stop while no command ran."""


def run_node(
    submission: Submission,
    *,
    node_rank: int,
    master_addr: str,
    master_port: int,
    start: int,
    wrap: Wrap | None = None,
) -> int:
    """Run one node in one start of a job; gives its exit code. On the main thread of a process.

    Args:
        node_rank: 0 to `nodes` - 1.
        master_addr: host of node 0, as the other nodes reach it.
        master_port: free port on it.
        start: number of the start, from 1.
        wrap: makes the command line under which a command sees the mounts; default: a mount namespace, or docker.
    """
    return (
        Node(submission, node_rank, master_addr, master_port, start, wrap or in_namespace_or_docker)
        .run()
        .status
    )


def forget_launcher(own: Container[str]) -> None:
    """Remove the variables of other launchers and jobs from the environment: this process is not one of their ranks.

    In a shell that torchrun has started, or in which the user has set `PET_RDZV_BACKEND`, torchrun would wait for nodes
    that never join.

    Args:
        own: the job's own variables, which stay.
    """
    for variable in list(os.environ):
        is_foreign = variable in CONTRACT or variable.startswith(("PET_", "TORCHELASTIC_"))
        if is_foreign and variable not in own:
            del os.environ[variable]


def node_argv(
    home: Path, master_addr: str, master_port: int, start: int, module: str = "hf_cloudtrain.jobs.node.node"
) -> list[str]:
    """The command line of the nodes in one start, without its last argument: the rank."""
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
    show_messages("cloudtrain: %(message)s")
    submission = Submission.load(given.pop("home"))
    sys.exit(run_node(prepare(submission) if prepare else submission, **given, wrap=wrap))


if __name__ == "__main__":
    main()
