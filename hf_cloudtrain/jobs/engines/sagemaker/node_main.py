"""One start of a container's node, in a process of its own: a node needs the main thread, and all signals.

python -m hf_cloudtrain.jobs.engines.sagemaker.node_main HOME, and the options of hf_cloudtrain.jobs.node.node
"""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys

from hf_cloudtrain.jobs.node import node
from hf_cloudtrain.jobs.submission import Submission
from hf_cloudtrain.runtime.process_tree import kill_children

MASTER_PORT = 7777
"""Where the ranks meet, as in SageMaker's own toolkit."""


class NodeProcess:
    """This container's node."""

    def __init__(self, submission: Submission, rank: int, master_addr: str) -> None:
        self._submission = submission
        self._rank = rank
        self._master_addr = master_addr
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, number: int) -> None:
        """Start it, for the number-th time. Raises OSError."""
        argv = node.node_argv(
            self._submission.home,
            self._master_addr,
            MASTER_PORT,
            number,
            "hf_cloudtrain.jobs.engines.sagemaker.node_main",
        )
        self._process = subprocess.Popen([*argv, str(self._rank)], stdin=subprocess.DEVNULL)

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        assert self._process is not None
        return self._process.poll()

    def terminate(self) -> None:
        """Ask it to stop; it has its grace."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def kill(self) -> None:
        """End it, and all that it has started, at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()  # before kill_children, which would collect its exit code
            kill_children()


def without_dataset(submission: Submission) -> Submission:
    """The dataset and the links are there already: the node downloads and mounts nothing."""
    return dataclasses.replace(submission, job=submission.job.model_copy(update={"data": None}))


if __name__ == "__main__":
    logging.basicConfig(format="cloudtrain: %(message)s", stream=sys.stdout)
    logging.getLogger("hf_cloudtrain").setLevel(logging.INFO)
    node.main(without_dataset, wrap=lambda _, mounts, command: command)
