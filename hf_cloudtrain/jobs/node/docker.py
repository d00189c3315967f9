"""The command of a job in a container of its image, where the machine has docker.

No test has run it on a real Docker engine: it follows
https://docs.docker.com/reference/cli/docker/container/run.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from hf_cloudtrain import env
from hf_cloudtrain.jobs.node.folders import unmoved_folders
from hf_cloudtrain.jobs.node.mounts import Mount, argv
from hf_cloudtrain.jobs.spec.node_plan import CONTRACT, PERIFLOW
from hf_cloudtrain.jobs.submission import Submission
from hf_cloudtrain.launch.environment import FOLDER

FORWARDED = ("HF_", "AWS_", "GOOGLE_", "AZURE_", "NCCL_", "WANDB_")
"""Variables of the machine that a container gets besides the job's, by prefix: PATH and HOME are those of the image."""

TIMEOUT = 5.0
"""Seconds in which a Docker engine must answer."""
INIT = """\
trap '[ $$ != 1 ] && kill -TERM $! || kill -TERM -1' TERM
"$@" &
while :; do
    wait $!
    code=$?
    kill -0 $! 2>/dev/null || exit $code
done
"""
"""The first process of a container: only this one receives signals, and it has no default handler (pid_namespaces(7)).

-1 means every process of the container; with `--pid=host` it would mean every process of the machine.
"""


HOOK = f"""\
PYTHONPATH={shlex.quote(FOLDER)}${{PYTHONPATH:+:$PYTHONPATH}}
export PYTHONPATH
"""
"""Puts the hook of `cloudtrain launch` in front of the `PYTHONPATH` of the image, which this machine does not know."""


def has_docker() -> bool:
    """Whether there is a client, and an engine that answers within 5 seconds."""
    command = ["docker", "version", "--format", "{{.Server.Version}}"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and bool(done.stdout.strip())


def in_namespace_or_docker(submission: Submission, mounts: Sequence[Mount], command: list[str]) -> list[str]:
    """The command line under which `command` sees the mounts: in the job's image if the machine has docker."""
    image = submission.job.job_setting.docker.image
    return (
        argv(mounts, command)
        if image is None or not has_docker()
        else docker_argv(submission, image, mounts, command)
    )


def docker_argv(
    submission: Submission, image: str, mounts: Sequence[Mount], command: Sequence[str]
) -> list[str]:
    """The command line that runs `command` in a container of an image.

    The client forwards SIGTERM to the container, where `INIT` sends it to all processes; its exit code is that of the
    command. A killed client leaves the container behind: `docker kill NAME` ends it. The values of variables are not in
    the command line: the client takes them from its own environment. Network and shared memory are the machine's, as
    torchrun and its workers need them. The job's home is mounted at its own path.
    """
    home = Mount(submission.home, str(submission.home))
    mounts = sorted([*mounts, *unmoved_folders(submission)], key=lambda mount: mount.target.count("/"))
    found = ["docker", "run", "--rm", "--init=false", "--network", "host", "--ipc", "host"]
    if shutil.which("nvidia-smi"):
        found += ["--gpus", "all"]
    plan = submission.plan
    hook = [Mount(Path(FOLDER), FOLDER, read_only=True)] if plan.launch else []
    for mount in (home, *mounts, *hook):
        mount.source.mkdir(parents=True, exist_ok=True)  # docker refuses a source that does not exist
        found += ["--mount", _mount_option(mount)]
    forwarded = {name for name in os.environ if name.startswith(FORWARDED)}
    for variable in sorted(forwarded.union(CONTRACT, PERIFLOW, (env.PRICE,), plan.variables)):
        found += ["--env", variable]
    name = container_name(submission)
    first = HOOK + INIT if plan.launch else INIT
    return [*found, "--name", name, "--entrypoint", "sh", image, "-c", first, "sh", *command]


def container_name(submission: Submission) -> str:
    """Name of the container of this node."""
    return f"cloudtrain-{submission.id}-{os.getpid()}"


def _mount_option(mount: Mount) -> str:
    fields = [
        "type=bind",
        f"source={mount.source}",
        f"target={mount.target}",
        *["readonly"] * mount.read_only,
    ]
    # The value is a line of CSV.
    return ",".join('"' + text.replace('"', '""') + '"' if set(text) & set(',"') else text for text in fields)
