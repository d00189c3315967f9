"""The nodes of a job within a Slurm allocation: one srun, one task per node.

A signal to the job step asks the nodes to stop; a signal to srun would kill them. It is SIGURG, which processes without
a handler ignore: SIGTERM would end a `| tee` beside a training that saves.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time

from hf_cloudtrain.errors import PreemptedExit
from hf_cloudtrain.jobs.engines.slurm.client import SlurmError, SlurmSilentError, call
from hf_cloudtrain.jobs.gang import ExitCodes, Gang
from hf_cloudtrain.jobs.logs import mark_start
from hf_cloudtrain.jobs.node.node import node_argv
from hf_cloudtrain.jobs.node.stopping import MARGIN
from hf_cloudtrain.jobs.submission import Submission

logger = logging.getLogger(__name__)

SIGNAL_PAUSE = 2.0
"""Seconds between two signals: a node that has not installed its handler yet has lost the first one."""
FIRST_PORT, PORTS = 20_000, 12_000
"""Below those that Linux assigns: https://docs.kernel.org/networking/ip-sysctl.html (ip_local_port_range)."""
ALLOCATION_OPTIONS = (
    *("SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NTASKS_PER_NODE", "SLURM_CPUS_PER_TASK", "SLURM_TRES_PER_TASK"),
    *("SLURM_EXPORT_ENV", "SLURM_DISTRIBUTION", "SLURM_SRUN_REDUCE_TASK_EXIT_MSG"),
)
"""Options of the allocation that srun would apply to itself: it starts one task per node, which has all of it."""


class SlurmGang(Gang):
    """The nodes of a job; see `Gang`.

    Args:
        job: number of the Slurm job.
    """

    def __init__(self, submission: Submission, job: str) -> None:
        super().__init__(submission)
        self._job = job
        self._srun: subprocess.Popen[str] | None = None
        self._listener: threading.Thread | None = None
        self._ends: dict[int, int | None] = {}
        """Exit codes of the nodes that failed; None for one that was killed or lost."""
        self._signalled_at = 0.0
        self.codes: ExitCodes = ()
        """Exit codes of the last start."""
        self.launch_failure: str | None = None
        """Why Slurm could not launch a node."""

    @property
    def all_have_saved(self) -> bool:
        """Whether all nodes were asked to stop from outside, and not because one of them failed."""
        return self.launch_failure is None and set(self.codes) <= {0, PreemptedExit.CODE}

    def _start_nodes(self) -> None:
        self._ends = {}
        self.launch_failure = None
        self._signalled_at = 0.0
        mark_start(self._submission, self.number)
        try:
            address = master_addr()
        except SlurmError as error:
            raise OSError(str(error)) from error
        command = srun(self._submission, address, master_port(self._job, self.number), self.number)
        self._srun = subprocess.Popen(
            command,
            env={name: value for name, value in os.environ.items() if name not in ALLOCATION_OPTIONS},
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        self._listener = threading.Thread(target=self._listen, args=(self._srun,), name="cloudtrain-srun")
        self._listener.start()

    def _exit_codes(self) -> ExitCodes | None:
        assert self._srun is not None
        assert self._listener is not None
        code = self._srun.poll()
        if code is None:
            return None
        self._listener.join()
        self.codes = self._codes(code)
        return self.codes

    def _has_failed(self) -> bool:
        return bool(self._ends or self.launch_failure)

    def _ask_to_stop(self) -> None:
        self._signal("URG")

    def _remind(self) -> None:
        if time.monotonic() > self._signalled_at + SIGNAL_PAUSE:
            self._signal("URG")

    def kill(self) -> None:
        """End what is left, at once."""
        if self._srun is None or self._srun.poll() is not None:
            return
        self._signal("KILL")
        try:
            self._srun.wait(MARGIN)
        except subprocess.TimeoutExpired:
            self._srun.kill()  # Slurm ends the nodes with the job
            self._srun.wait()

    def _signal(self, name: str) -> None:
        self._signalled_at = time.monotonic()
        assert self._srun is not None
        try:
            for step in self._steps():
                call("scancel", f"--signal={name}", step)
        except SlurmSilentError:
            # srun forwards this one without the controller.
            self._srun.send_signal(signal.SIGUSR1)
        except SlurmError as error:
            logger.info("%s", error)  # Slurm is ending the nodes, or they have ended

    def _steps(self) -> list[str]:
        """The number of the job step, once there is one."""
        lines = call("squeue", "--noheader", "--steps", f"--jobs={self._job}", "--format=%i %j").splitlines()
        steps = [line.partition(" ") for line in lines]
        return [number for number, _, name in steps if name.strip() == _step_name(self.number)]

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            if "lacks support for cpu binding" not in line:  # --cpu-bind=none asks for no binding
                sys.stderr.write(line)
                sys.stderr.flush()
            self._ends.update(bad_ends(line))
            if re.match(r"srun: error: .*\blaunch\b.*\bfailed", line):
                self.launch_failure = self.launch_failure or line.strip()

    def _codes(self, code: int) -> ExitCodes:
        ranks = range(self._submission.plan.nodes)
        if (code == 0 or self._ends) and not self.launch_failure:
            return tuple(self._ends.get(rank, 0) for rank in ranks)
        return (None,) * len(ranks)  # srun itself failed; its message is in the supervisor's log


def srun(submission: Submission, address: str, port: int, number: int) -> list[str]:
    """The command that starts the nodes."""
    nodes = submission.plan.nodes
    log = submission.log / "node-%n.log"
    node = shlex.join(node_argv(submission.home, address, port, number))
    return [
        *("srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"),
        # A node that has saved ends with 75 while others still save: the cluster's default could kill those.
        *("--kill-on-bad-exit=0", "--wait=0"),
        *("--cpu-bind=none", "--mpi=none", "--export=ALL", "--input=none"),
        *(f"--job-name={_step_name(number)}", "--open-mode=append", f"--output={log}"),
        *("bash", "-c", f"exec {node} $SLURM_NODEID"),
    ]


def bad_ends(line: str) -> dict[int, int | None]:
    """Exit codes by node in a line that srun prints; it prints none for nodes that end with 0.

    Example:
        >>> bad_ends("srun: error: n[1-2]: tasks 0-1: Exited with exit code 75")
        {0: 75, 1: 75}
    """
    match = re.search(r"\btasks? ([\d,-]+): (.*)", line)
    if match is None or not line.startswith("srun: "):
        return {}
    code = re.match(r"Exited with exit code (\d+)", match[2])
    if code is None and not re.match(
        r"Killed|Terminated|Aborted|Segmentation|.*core dumped|unknown|.*[Ss]ignal", match[2]
    ):
        return {}
    ends: dict[int, int | None] = {}
    for part in filter(None, match[1].split(",")):
        first, _, last = part.partition("-")
        ends.update(dict.fromkeys(range(int(first), int(last or first) + 1), int(code[1]) if code else None))
    return ends


def master_addr() -> str:
    """How the nodes reach the first one: its name, or its address if the name does not resolve."""
    names = call("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()
    try:
        socket.getaddrinfo(names[0], None)
        return names[0]
    except OSError:
        match = re.search(r"\bNodeAddr=(\S+)", call("scontrol", "show", "node", "-o", names[0]))
        return match[1] if match else names[0]


def master_port(job: str, number: int) -> int:
    """A port for one job and start; if another process holds it, the next start uses a different one."""
    return FIRST_PORT + (int(job) * 101 + number) % PORTS


def _step_name(number: int) -> str:
    return f"start-{number}"
