"""A template for an engine: one node, as a child of a supervisor process on this machine.

docs/add-an-engine.md explains each part. A test (tests/unit/jobs/engines/test_template.py) runs this file as it is.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator

from hf_cloudtrain import env
from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.jobs.engines.protocol import EngineStatus
from hf_cloudtrain.jobs.gang import ExitCodes, Gang
from hf_cloudtrain.jobs.logs import follow_nodes, mark_start
from hf_cloudtrain.jobs.node.node import node_argv
from hf_cloudtrain.jobs.records import JobRecord, JobStore
from hf_cloudtrain.jobs.spec.node_plan import CONTRACT
from hf_cloudtrain.jobs.submission import Submission
from hf_cloudtrain.jobs.supervisor import Supervisor
from hf_cloudtrain.runtime.process_tree import adopt_orphans, is_alive, kill_children, this_process

START_SECONDS = 60.0
"""Seconds for the supervisor to start."""


class TemplateEngine:
    """Says where the job runs, and asks that place about it. See `Engine`."""

    def check(self, submission: Submission) -> None:
        """Refuse what this engine cannot do. Nothing exists yet, so it costs the user nothing."""
        nodes = submission.plan.nodes
        if nodes != 1:
            raise ConfigurationError(
                f"This engine runs one node, but the job needs {nodes}. Set `num_devices: 1`."
            )

    def show(self, submission: Submission) -> str:
        """Exactly what `submit` would start."""
        return shlex.join(_supervisor_argv(submission)) + "\n"

    def submit(self, submission: Submission, store: JobStore, record: JobRecord) -> JobRecord:
        """Start the supervisor, and return once it has written its handle into the record."""
        submission.log.mkdir(parents=True, exist_ok=True)
        log_file = submission.log / "supervisor.log"
        environment = {name: value for name, value in os.environ.items() if name not in CONTRACT}
        environment |= submission.plan.own_variables(os.environ)
        with open(log_file, "ab") as log:
            subprocess.run(
                _supervisor_argv(submission),
                env={**environment, env.STORE: submission.store},
                cwd=submission.home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                check=True,
            )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            now = store.read(record.id)
            if now.handle != record.handle:  # a resumed job has the handle of its last supervisor
                return now
            time.sleep(0.1)
        raise ConfigurationError(f"The supervisor of the job did not start. See {str(log_file)!r}.")

    def look(self, record: JobRecord) -> EngineStatus | None:
        """The supervisor writes the record, so there is something to add only when it has disappeared."""
        if record.is_over or is_alive(record.handle):
            return None
        return EngineStatus("lost", f"Its supervisor process has disappeared. {record.resume_hint}")

    def cancel(self, record: JobRecord, store: JobStore) -> None:
        """Nothing: the supervisor sees the cancel mark in the store, and enforces the grace."""

    def lines(self, record: JobRecord, node_rank: int | None, follow: bool) -> Iterator[str]:
        """From the file that the node writes to."""
        return follow_nodes(record, node_rank, follow, lambda now: now.is_over or self.look(now) is not None)


class TemplateGang(Gang):
    """Starts and stops the node of each start of a job, for the supervisor."""

    _node: subprocess.Popen[bytes] | None = None

    def _start_nodes(self) -> None:
        mark_start(self._submission, self.number)
        argv = [*node_argv(self._submission.home, "127.0.0.1", 29500, self.number), "0"]
        with open(self._submission.node_log(0), "ab") as log:
            self._node = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )

    def _exit_codes(self) -> ExitCodes | None:
        code = self._node.poll() if self._node else None
        return None if code is None else (code if code >= 0 else None,)  # None for a node that was killed

    def _has_failed(self) -> bool:
        return False  # there is no other node to stop

    def _ask_to_stop(self) -> None:
        if self._node:
            self._node.terminate()

    def kill(self) -> None:
        """End everything that this process has started."""
        kill_children()


def _supervisor_argv(submission: Submission) -> list[str]:
    return [
        sys.executable,
        __file__,
        str(submission.home),
    ]  # in the package: "-m", "hf_cloudtrain.jobs.engines.NAME"


def main() -> None:
    """Leave the supervisor running in a session of its own, which the end of the terminal does not end."""
    if os.fork() > 0:
        return
    os.setsid()
    submission = Submission.load(sys.argv[1])
    store = JobStore(submission.store)
    adopt_orphans()
    record = store.write(store.read(submission.id), state="starting", reason=None, handle=this_process())
    Supervisor(submission, store, record, TemplateGang(submission)).run()


ENGINE = TemplateEngine()

if __name__ == "__main__":
    main()
