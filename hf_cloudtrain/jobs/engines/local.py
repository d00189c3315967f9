"""This machine: one or several agents under a supervisor that outlives the terminal.

python -m hf_cloudtrain.jobs.engines.local HOME     the supervisor of a job
"""

from __future__ import annotations

import logging
import os
import platform
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from hf_cloudtrain import env
from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.jobs.engines.protocol import EngineStatus
from hf_cloudtrain.jobs.gang import ExitCodes, GracefulGang
from hf_cloudtrain.jobs.logs import follow_files, last_lines
from hf_cloudtrain.jobs.node.mounts import Mount, check, has_docker
from hf_cloudtrain.jobs.node.node import folder_mounts
from hf_cloudtrain.jobs.node.stopping import MARGIN
from hf_cloudtrain.jobs.records import JobRecord, JobStore
from hf_cloudtrain.jobs.spec.node_plan import CONTRACT
from hf_cloudtrain.jobs.submission import SUPERVISOR_LOCK, Submission
from hf_cloudtrain.jobs.supervisor import Supervisor
from hf_cloudtrain.runtime.files import locked
from hf_cloudtrain.runtime.process_tree import adopt_orphans, is_alive, kill_children, this_process

HOST = "127.0.0.1"
PORT = 29500
"""Shown by `--dry-run`; a start takes one that is free."""
_SUPERVISOR = [sys.executable, "-m", "hf_cloudtrain.jobs.engines.local"]


class LocalEngine:
    """Agents of this machine. See `Engine`."""

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
        """One command line a node, with what is around it."""
        shown = []
        for rank in range(submission.plan.nodes):
            environment = submission.plan.shown(
                submission.plan.environment(
                    rank,
                    master_addr=HOST,
                    master_port=PORT,
                    run_url=submission.run_url,
                    exit_file=str(submission.exit_file(rank, 1)),
                    shell=_any_value(submission),
                )
            )
            ours = "\n".join(f"  {name}={shlex.quote(value)}" for name, value in environment.items())
            shown.append(f"node {rank}: {shlex.join(_command(submission, rank, PORT, 1))}\n{ours}")
        job = submission.job
        mounts = "\n".join(
            f"  {mount.target}  <- {mount.source}{' (to read)' if mount.read_only else ''}"
            for mount in _all_mounts(submission)
        )
        setup = f"setup:\n{_indented(job.command.setup)}\n" if job.command.setup else ""
        return (
            "\n".join(shown)
            + (f"\nmounts:\n{mounts}" if mounts else "")
            + f"\n{setup}command:\n{_indented(job.command.run)}\n"
        )

    def submit(self, submission: Submission, store: JobStore, record: JobRecord) -> JobRecord:
        """Start the supervisor, in a session of its own."""
        self.check(submission)  # once more: now there is a workspace, with folders that a mount would hide
        submission.log.mkdir(parents=True, exist_ok=True)
        environment = {name: value for name, value in os.environ.items() if name not in CONTRACT}
        environment |= submission.plan.own_variables(os.environ)
        # Absolute: the supervisor is elsewhere.
        environment |= {env.CACHE: env.cache(None), env.STORE: submission.store}
        with open(submission.log / "supervisor.log", "ab") as log:
            answer = subprocess.run(
                [*_SUPERVISOR, str(submission.home)],
                env={**environment, "PATH": _path(environment)},
                # Not here, where `-m` would take a `queue.py` of the user's for Python's own.
                cwd=submission.home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if answer.returncode != 0:
            log_file = submission.log / "supervisor.log"
            said = " ".join(last_lines(log_file, 1)) or f"It ended with exit code {answer.returncode}."
            raise ConfigurationError(
                f"The supervisor of the job did not start. {said} ({str(log_file)!r} says more.)"
            )
        return store.read(record.id)

    def look(self, record: JobRecord) -> EngineStatus | None:
        """Whether the supervisor is still there, where it ran on this machine."""
        if record.is_over or record.handle.get("host") != platform.node():
            return None
        if is_alive(record.handle):
            return None
        return EngineStatus(
            "lost", f"Its supervisor is gone. `cloudtrain job run --resume {record.id}` goes on."
        )

    def cancel(self, record: JobRecord, store: JobStore) -> None:
        """Nothing but the mark in the store, which the supervisor looks at."""

    def lines(self, record: JobRecord, node_rank: int | None, follow: bool) -> Iterator[str]:
        """From the nodes' files."""
        submission = Submission.load_here(record.home)
        ranks = range(record.nodes) if node_rank is None else [node_rank]
        files = {f"node {rank}": submission.node_log(rank) for rank in ranks}
        store = JobStore(submission.store)

        def is_over() -> bool:
            now = store.read(record.id)
            return now.is_over or self.look(now) is not None

        return follow_files(files, follow, is_over)


class LocalGang(GracefulGang):
    """The nodes of a job on this machine, each a process with a session of its own."""

    def __init__(self, submission: Submission) -> None:
        super().__init__(submission)
        self._processes: list[subprocess.Popen[bytes]] = []

    def _start_nodes(self) -> None:
        port = free_port()
        self._processes = []
        for rank in range(self._submission.plan.nodes):
            with open(self._submission.node_log(rank), "ab") as log:
                log.write(f"--- start {self.number} ---\n".encode())
                log.flush()
                self._processes.append(
                    subprocess.Popen(
                        _command(self._submission, rank, port, self.number),
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
        kill_children()  # a node that was killed leaves its workers to us
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
    """A port of the loopback that nobody listens on now."""
    with socket.socket() as found:
        found.bind((HOST, 0))
        port: int = found.getsockname()[1]
        return port


def main() -> None:
    """The supervisor of a job: this process ends once its child has taken the job over."""
    reading, writing = os.pipe()
    if os.fork() > 0:
        os.close(writing)
        with os.fdopen(reading, "rb") as answer:
            sys.exit(0 if answer.read() else 1)
    os.close(reading)
    os.setsid()  # the terminal's end is not ours

    def say_taken_over() -> None:
        os.write(writing, b"1")
        os.close(writing)

    supervise(Submission.load(sys.argv[1]), say_taken_over)


def supervise(submission: Submission, say_taken_over: Callable[[], None]) -> None:
    """Be the supervisor of a job, the only one on this machine.

    Args:
        say_taken_over: called once the record says who the supervisor is.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    adopt_orphans()
    store = JobStore(submission.store)
    with locked(submission.home / SUPERVISOR_LOCK, patience=submission.plan.grace + 3 * MARGIN):
        record = store.write(store.read(submission.id), state="starting", reason=None, handle=this_process())
        say_taken_over()
        Supervisor(submission, store, record, LocalGang(submission)).run()


def _command(submission: Submission, rank: int, port: int, number: int) -> list[str]:
    return [
        *(sys.executable, "-m", "hf_cloudtrain.jobs.node.node", str(submission.home)),
        *(
            "--node-rank",
            str(rank),
            "--master-addr",
            HOST,
            "--master-port",
            str(port),
            "--start",
            str(number),
        ),
    ]


def _all_mounts(submission: Submission) -> list[Mount]:
    mounts = folder_mounts(submission)
    data = submission.job.data
    if data is not None:
        mounts.append(Mount(submission.home / "data", data.mount_path, read_only=True))
    return mounts


def _path(environment: Mapping[str, str]) -> str:
    """Where commands are found: first beside this interpreter, which need not be activated."""
    return f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', os.defpath)}"


def _any_value(submission: Submission) -> dict[str, str]:
    return {**dict.fromkeys(submission.plan.variables, ""), **os.environ}


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.strip().splitlines())


ENGINE = LocalEngine()

if __name__ == "__main__":
    main()
