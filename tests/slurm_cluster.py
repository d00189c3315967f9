"""A real Slurm of two nodes on free loopback ports, for tests: Debian's slurmctld, slurmd, slurm-client and munge.

    with SlurmCluster() as slurm:
        slurm.env                                     # SLURM_CONF: how sbatch and the other commands find it
        slurm.run("sbatch", "--parsable", "job.sh")

Both nodes are this machine, by `slurmd -N`, and their names do not resolve. Each has `GPUS` fake GPUs. Jobs of the
partition `prod` preempt those of `spot`. Daemons die with the thread that started them (Linux); jobs are cancelled,
and waited for, before they are stopped.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.servers import ServerMissingError, dies_with_us, free_port, stop

INSTALL = "apt-get install slurmctld slurmd slurm-client munge"
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
NODES = ("n1", "n2")
GPUS = 4
"""Per node, of the type v100."""
CPUS = 16
"""Per node, whatever the machine has: a test's job never waits for the job of a different test."""
START_SECONDS = 60
STOP_SECONDS = 30
KILL_WAIT = 10
"""Seconds from TERM to KILL of a cancelled or timed out job; 30 by Slurm's default."""
GRACE = 20
"""Seconds from the notice to the end of a preempted job."""
ATTEMPTS = 3
"""Ports that were free may be taken before the daemons bind them."""
POLL = 0.05

# linuxproc and task/none need no cgroups. A requeued job waits until its old credential has expired: 120 s by default.
CONFIG = """\
ClusterName=cloudtrain
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={cred_expire}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
SlurmctldParameters={controller}
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=1,sched_min_interval=100000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait={kill_wait}
MinJobAge={min_job_age}
SlurmdTimeout=10
MessageTimeout=5
GresTypes=gpu
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs={cpus} RealMemory=1000 Gres=gpu:v100:{gpus}
PartitionName=spot Nodes=n[1-2] Default=YES PriorityTier=1 GraceTime={grace} MaxTime=60 DefaultTime=30
PartitionName=prod Nodes=n[1-2] PriorityTier=10 PreemptMode=OFF MaxTime=60 DefaultTime=30
"""


class SlurmCluster:
    """The daemons of one cluster.

    Args:
        min_job_age: seconds in which Slurm remembers a job that is over.
        sends_user_signal: whether a preempted job receives the signal of its own `--signal`; few clusters do this.
    """

    def __init__(self, *, min_job_age: int = 300, sends_user_signal: bool = False) -> None:
        self._min_job_age = min_job_age
        self._sends_user_signal = sends_user_signal
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> SlurmCluster:  # noqa: PYI034 - typing.Self came with Python 3.11
        for program in PROGRAMS:
            if shutil.which(program, path=_path()) is None:
                raise ServerMissingError(f"{program} is not installed ({INSTALL})")
        with contextlib.ExitStack() as until_stopped:
            folder = until_stopped.enter_context(tempfile.TemporaryDirectory(prefix="cloudtrain-slurm-"))
            self.folder = Path(folder)
            until_stopped.callback(self._stop)
            self._start_munge()
            if not any(self._start() for _ in range(ATTEMPTS)):
                raise RuntimeError(f"Slurm does not start:\n{self.log()}")
            self._until_stopped = until_stopped.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        with self._until_stopped:
            self.end_jobs(Path("/"))

    @property
    def env(self) -> dict[str, str]:
        """Environment variables for a user of this cluster."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command: str) -> str:
        """The output of one of Slurm's commands. Raises RuntimeError with its error."""
        done = subprocess.run(
            command,
            check=False,
            env={**os.environ, **self.env, "PATH": _path()},
            capture_output=True,
            text=True,
            timeout=START_SECONDS,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ends with {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows about a job: the fields of `scontrol show job`."""
        text = self.run("scontrol", "show", "job", "-o", number)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def end_jobs(self, below: Path) -> None:
        """End all jobs that were submitted from a folder, and wait until none of their processes is left."""
        lines = [line.split(" ", 1) for line in self.run("squeue", "-h", "-o", "%A %Z").splitlines()]
        numbers = [number for number, folder in lines if Path(folder).is_relative_to(below)]
        alive = ("squeue", "-h", "-t", "PENDING,CONFIGURING,RUNNING", "-o", "%A")
        deadline = time.monotonic() + STOP_SECONDS
        while any(map(self._steps, numbers)) or set(self.run(*alive).split()) & set(numbers):
            for how in (("--state=PENDING",), ("--batch", "--signal=KILL"), ("--signal=KILL",)):
                with contextlib.suppress(RuntimeError):  # some have ended since, and some are only beginning
                    self.run("scancel", *how, *numbers)
            if time.monotonic() > deadline:
                raise TimeoutError(f"jobs do not end:\n{self.run('squeue')}")
            time.sleep(POLL)

    @contextlib.contextmanager
    def down(self) -> Iterator[dict[str, str]]:
        """Without the controller; jobs still run. Yields an environment in which commands give up after a second."""
        stop(self._processes.pop("slurmctld"))
        impatient = self.folder / "impatient" / "slurm.conf"
        impatient.parent.mkdir(exist_ok=True)
        text = (self.folder / "slurm.conf").read_text()
        impatient.write_text(text.replace("MessageTimeout=5", "MessageTimeout=1"))
        try:
            yield {"SLURM_CONF": str(impatient)}
        finally:
            self._start_controller()
            self._wait_for(self._responds, "slurmctld")

    @contextlib.contextmanager
    def node_down(self, node: str) -> Iterator[None]:
        """With a node that Slurm considers down."""
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
        try:
            yield
        finally:
            if "down" in self.run("sinfo", "-h", "-n", node, "-o", "%T"):
                self.run("scontrol", "update", f"NodeName={node}", "State=IDLE")

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """With all GPUs allocated to a job that no other job preempts."""
        wanted = ("--partition=prod", f"--nodes={len(NODES)}", f"--gres=gpu:v100:{GPUS}")
        job = self.run("sbatch", "--parsable", *wanted, "--output=/dev/null", "--wrap=sleep 600").strip()
        deadline = time.monotonic() + START_SECONDS
        while self.job(job)["JobState"] != "RUNNING" and time.monotonic() < deadline:
            time.sleep(POLL)
        try:
            yield
        finally:
            self.run("scancel", job)

    def log(self) -> str:
        """The last lines of the daemons' logs."""
        texts = [
            f"{path.name}:\n{path.read_text(errors='replace')[-1500:]}" for path in self.folder.glob("*.log")
        ]
        return "\n".join(sorted(texts))

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
        self._popen(
            "munged",
            *("munged", "--foreground", "--force", "--num-threads=2", f"--key-file={key}"),
            *(f"--socket={self.folder}/munge.socket", f"--pid-file={self.folder}/munge.pid"),
            *(f"--log-file={self.folder}/munge.log", f"--seed-file={self.folder}/munge.seed"),
        )
        self._wait_for((self.folder / "munge.socket").exists, "munged")

    def _start(self) -> bool:
        """Whether all daemons answer; False if one ended, most likely because its port was in use."""
        self._write_config()
        self._start_controller()
        for node in NODES:
            self._popen(f"slurmd-{node}", "slurmd", "-D", "-N", node, "-f", self.env["SLURM_CONF"])
        try:
            self._wait_for(self._is_idle, "slurmctld", *(f"slurmd-{node}" for node in NODES))
        except ChildProcessError:
            for name in [name for name in self._processes if name != "munged"]:
                stop(self._processes.pop(name))
            return False
        return True

    def _start_controller(self) -> None:
        self._popen("slurmctld", "slurmctld", "-D", "-f", self.env["SLURM_CONF"])

    def _write_config(self) -> None:
        host = socket.gethostname().split(".")[0]
        (self.folder / "state").mkdir(exist_ok=True)
        controller = ["preempt_send_user_signal"] if self._sends_user_signal else []
        first, second = _two_ports()
        config = CONFIG.format(
            host=host,
            folder=self.folder,
            ports=(free_port(), first, second),
            controller=",".join([*controller, "idle_on_node_suspend"]),
            cred_expire=5,
            kill_wait=KILL_WAIT,
            min_job_age=self._min_job_age,
            cpus=CPUS,
            gpus=GPUS,
            grace=GRACE,
        )
        (self.folder / "slurm.conf").write_text(config)
        (self.folder / "plugstack.conf").write_text("")
        lines = [f"NodeName={node} Name=gpu Type=v100 File={','.join(self._gpus(node))}\n" for node in NODES]
        (self.folder / "gres.conf").write_text("".join(lines))

    def _gpus(self, node: str) -> list[str]:
        """Character devices like those of GPUs, which slurmd counts and allocates; a container may forbid making them."""
        paths = [self.folder / f"dev-{node}" / f"nvidia{number}" for number in range(GPUS)]
        for path in paths:
            path.parent.mkdir(exist_ok=True)
            if not path.exists():
                try:
                    os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
                except PermissionError:
                    path.touch()
        return [str(path) for path in paths]

    def _popen(self, name: str, *command: str) -> None:
        with open(self.folder / f"{name}.out.log", "ab") as log:
            self._processes[name] = subprocess.Popen(
                [*dies_with_us(), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env=_environment(self.env),
            )

    def _wait_for(self, condition: object, *names: str) -> None:
        assert callable(condition)
        deadline = time.monotonic() + START_SECONDS
        while not condition():
            for name in names:
                if self._processes[name].poll() is not None:
                    raise ChildProcessError(f"{name} ended with {self._processes[name].returncode}")
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{', '.join(names)} did not answer within {START_SECONDS} s:\n{self.log()}"
                )
            time.sleep(POLL)

    def _responds(self) -> bool:
        with contextlib.suppress(RuntimeError):
            self.run("scontrol", "ping")
            return True
        return False

    def _is_idle(self) -> bool:
        with contextlib.suppress(RuntimeError):
            return self.run("sinfo", "-h", "-p", "spot", "-t", "idle", "-o", "%D").strip() == str(len(NODES))
        return False

    def _steps(self, job: str) -> list[Path]:
        """Sockets of slurmstepd, which is in no daemon's process tree: each exists while it watches processes."""
        return [path for node in NODES for path in self.folder.glob(f"spool-{node}/{node}_{job}.*")]

    def _stop(self) -> None:
        for name in list(self._processes)[::-1]:
            stop(self._processes.pop(name))


def _two_ports() -> tuple[int, int]:
    """Two free ports side by side, as the range of a line of nodes needs them."""
    while True:
        first = free_port()
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", first + 1)):
            return first, first + 1


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    names = ("HOME", "LANG", "TMPDIR", "USER")
    return {**{name: os.environ[name] for name in names if name in os.environ}, **more, "PATH": _path()}
