"""The engine `local`: the nodes of a job as processes of this machine, under a supervisor that outlives the terminal.

python -m hf_cloudtrain.jobs.engines.local HOME     the supervisor of a job

job run -> supervisor, in a session of its own -> node 0 -> bash -> torchrun -> workers
                                               -> node 1 -> …
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from hf_cloudtrain import env
from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.jobs.engines.protocol import EngineStatus
from hf_cloudtrain.jobs.gang import ExitCodes, Gang
from hf_cloudtrain.jobs.logs import follow_nodes, last_lines, mark_start, show_messages
from hf_cloudtrain.jobs.node.docker import has_docker
from hf_cloudtrain.jobs.node.folders import folder_mounts
from hf_cloudtrain.jobs.node.mounts import Mount, check
from hf_cloudtrain.jobs.node.node import node_argv
from hf_cloudtrain.jobs.node.stopping import MARGIN
from hf_cloudtrain.jobs.records import JobRecord, JobStore
from hf_cloudtrain.jobs.spec.node_plan import CONTRACT, periflow_variables
from hf_cloudtrain.jobs.submission import SUPERVISOR_LOCK, Submission
from hf_cloudtrain.jobs.supervisor import Supervisor
from hf_cloudtrain.runtime.files import locked
from hf_cloudtrain.runtime.process_tree import adopt_orphans, is_alive, kill_children, this_process

HOST = "127.0.0.1"
PORT = 29500
"""What `--dry-run` shows; a start uses a free port."""


class LocalEngine:
    """This machine. See `Engine`."""

    def check(self, submission: Submission) -> None:
        """Refuse what cannot run here."""
        uses_torchrun = re.search(r"(^|[\s;&|(])torchrun\s", submission.job.command.run)
        if uses_torchrun and shutil.which("torchrun", path=_path(os.environ)) is None:
            raise ConfigurationError(
                "'torchrun' is not found. Install torch into the environment of cloudtrain: pip install torch"
            )
        image = submission.job.job_setting.docker.image
        if image is None or not has_docker():
            check(_all_mounts(submission))

    def show(self, submission: Submission) -> str:
        """The command line of each node with its environment, the mounts, and the job's commands."""
        plan, command = submission.plan, submission.job.command
        shell = {**dict.fromkeys(plan.variables, ""), **os.environ}  # a variable may be missing here
        text = ""
        for rank in range(plan.nodes):
            environment = plan.environment(
                rank,
                master_addr=HOST,
                master_port=PORT,
                run_url=submission.run_url,
                exit_file=str(submission.exit_file(rank, 1)),
                shell=shell,
            )
            text += f"node {rank}: {shlex.join([*node_argv(submission.home, HOST, PORT, 1), str(rank)])}\n"
            shown = {**periflow_variables(plan.checkpoint_dir, 0), **plan.shown(environment)}
            text += "".join(f"  {name}={shlex.quote(value)}\n" for name, value in shown.items())
        mounts = "".join(
            f"  {mount.target}  <- {mount.source}{' (read-only)' if mount.read_only else ''}\n"
            for mount in _all_mounts(submission)
        )
        sections = {
            "mounts": mounts,
            "setup": command.setup and _indented(command.setup),
            "command": _indented(command.run),
        }
        return text + "".join(f"{name}:\n{section}" for name, section in sections.items() if section)

    def submit(self, submission: Submission, store: JobStore, record: JobRecord) -> JobRecord:
        """Start the supervisor, in a session of its own."""
        self.check(submission)  # again: now there is a workspace, with folders that a mount could hide
        submission.log.mkdir(parents=True, exist_ok=True)
        environment = {name: value for name, value in os.environ.items() if name not in CONTRACT}
        environment |= submission.plan.own_variables(os.environ)
        # Absolute paths: the supervisor runs in a different folder.
        environment |= {env.CACHE: env.cache(None), env.STORE: submission.store}
        log_file = submission.log / "supervisor.log"
        with open(log_file, "ab") as log:
            done = subprocess.run(
                [sys.executable, "-m", "hf_cloudtrain.jobs.engines.local", str(submission.home)],
                env={**environment, "PATH": _path(environment)},
                # Not in the user's folder, where `-m` would import a `queue.py` of the user instead of Python's own.
                cwd=submission.home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if done.returncode != 0:
            reason = " ".join(last_lines(log_file, 1)) or f"It ended with exit code {done.returncode}."
            raise ConfigurationError(
                f"The supervisor of the job did not start. {reason} See {str(log_file)!r}."
            )
        return store.read(record.id)

    def look(self, record: JobRecord) -> EngineStatus | None:
        """Whether the supervisor still runs, if it ran on this machine."""
        if record.is_over or record.handle.get("host") != platform.node() or is_alive(record.handle):
            return None
        return EngineStatus("lost", f"Its supervisor process has disappeared. {record.resume_hint}")

    def cancel(self, record: JobRecord, store: JobStore) -> None:
        """Nothing: the supervisor sees the cancel mark in the store."""

    def lines(self, record: JobRecord, node_rank: int | None, follow: bool) -> Iterator[str]:
        """From the nodes' files."""
        return follow_nodes(record, node_rank, follow, lambda now: now.is_over or self.look(now) is not None)


class LocalGang(Gang):
    """The nodes of a job on this machine, each a process with a session of its own."""

    def __init__(self, submission: Submission) -> None:
        super().__init__(submission)
        self._processes: list[subprocess.Popen[bytes]] = []

    def _start_nodes(self) -> None:
        self._processes = []
        mark_start(self._submission, self.number)
        argv = node_argv(self._submission.home, HOST, free_port(), self.number)
        for rank in range(self._submission.plan.nodes):
            with open(self._submission.node_log(rank), "ab") as log:
                self._processes.append(
                    subprocess.Popen(
                        [*argv, str(rank)],
                        cwd=self._submission.home,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )

    def _exit_codes(self) -> ExitCodes | None:
        codes = [process.poll() for process in self._processes]
        if None in codes:
            return None
        kill_children()  # the workers of a node that was killed are ours now
        return tuple(None if code is not None and code < 0 else code for code in codes)

    def _has_failed(self) -> bool:
        return any(process.returncode for process in self._processes)

    def _ask_to_stop(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.terminate()

    def kill(self) -> None:
        """SIGKILL to everything below this process."""
        kill_children()


def free_port() -> int:
    """A port of the loopback that no process listens on now."""
    with socket.socket() as found:
        found.bind((HOST, 0))
        port: int = found.getsockname()[1]
        return port


def main() -> None:
    """Start the supervisor of a job as a child, and exit once the job's record names it."""
    reading, writing = os.pipe()
    if os.fork() > 0:
        os.close(writing)
        with os.fdopen(reading, "rb") as answer:
            sys.exit(0 if answer.read() else 1)
    os.close(reading)
    os.setsid()  # the end of the terminal must not end the job

    def announce() -> None:
        os.write(writing, b"1")
        os.close(writing)

    supervise(Submission.load(sys.argv[1]), announce)


def supervise(submission: Submission, announce: Callable[[], None]) -> None:
    """Be the supervisor of a job, the only one on this machine.

    Args:
        announce: called once the record names this process as the supervisor.
    """
    show_messages("%(asctime)s %(message)s")
    adopt_orphans()
    store = JobStore(submission.store)
    with locked(submission.home / SUPERVISOR_LOCK, patience=submission.plan.grace + 3 * MARGIN):
        record = store.write(store.read(submission.id), state="starting", reason=None, handle=this_process())
        announce()
        Supervisor(submission, store, record, LocalGang(submission)).run()


def _all_mounts(submission: Submission) -> list[Mount]:
    mounts = folder_mounts(submission)
    data = submission.job.data
    if data is not None:
        mounts.append(Mount(submission.home / "data", data.mount_path, read_only=True))
    return mounts


def _path(environment: Mapping[str, str]) -> str:
    """The PATH, with the folder of this Python first: its environment need not be activated."""
    return f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', os.defpath)}"


def _indented(text: str) -> str:
    return textwrap.indent(text.strip(), "  ") + "\n"


ENGINE = LocalEngine()

if __name__ == "__main__":
    main()
