"""The nodes of a job within a SageMaker training job: the first container tells the others when to start and to stop.

    python -m hf_cloudtrain.jobs.engines.sagemaker.gang HOME --node-rank 0 --master-addr algo-1 --start 1      one node, one start

SageMaker ends a training job as soon as one of its containers ends with an error, so each stays until all know how the job
ends. Between starts nothing is taken anew: neither machines, nor images, nor data.

    other -> first    {"rank": 1}, and {"ended": 1, "code": 0, "exit": {…}, "node": {…}} with what the node wrote
    first -> other    {"start": 1}, {"stop": 1}, {"kill": 1}, {"over": {"state": "finished", "reason": null}}
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hf_cloudtrain.jobs.gang import ExitCodes, GracefulGang
from hf_cloudtrain.jobs.node.node import run_node
from hf_cloudtrain.jobs.node.stopping import MARGIN
from hf_cloudtrain.jobs.submission import Submission
from hf_cloudtrain.runtime.process_tree import kill_children
from hf_cloudtrain.tracking.exit_record import read_end

logger = logging.getLogger(__name__)

MASTER_PORT = 7777
"""Where the ranks meet, as SageMaker's own toolkit has it."""
PORT = 7778
"""Where the containers meet."""
PATIENCE = 600.0
"""Seconds for all containers to come. They start together, and each has the channels by then."""
POLL = 0.1
"""Seconds of one wait for a message."""
MAX_LINE = 2**20
"""Bytes of a message: a reason can be a traceback."""


class Line:
    """Messages to and from another container."""

    def __init__(self, connection: socket.socket) -> None:
        self.is_open = True
        self._connection = connection
        self._rest = b""

    def send(self, **message: Any) -> None:
        """Send one; a container that is gone hears nothing."""
        try:
            self._connection.settimeout(MARGIN)
            self._connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self.is_open = False

    def messages(self, seconds: float) -> list[dict[str, Any]]:
        """What has come, after at most some seconds. Raises ValueError where it is none of ours."""
        if not self.is_open:
            return []
        self._connection.settimeout(max(seconds, 0.001))
        try:
            data = self._connection.recv(65536)
        except TimeoutError:
            return []
        except OSError:
            data = b""
        self.is_open = bool(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_LINE:
            raise ValueError("a message has no end")
        found = [json.loads(line) for line in lines]
        if not all(isinstance(message, dict) for message in found):
            raise ValueError("a message is no object")
        return found

    def close(self) -> None:
        """Hang up."""
        self.is_open = False
        self._connection.close()


class NodeProcess:
    """One start of this container's node, in a process of its own: a node takes the main thread, and all signals."""

    def __init__(self, submission: Submission, rank: int, master_addr: str) -> None:
        self._words = [
            *(sys.executable, "-m", "hf_cloudtrain.jobs.engines.sagemaker.gang", str(submission.home)),
            *("--node-rank", str(rank), "--master-addr", master_addr),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, number: int) -> None:
        """Start it, for the number-th time. Raises OSError."""
        words = [*self._words, "--start", str(number)]
        self._process = subprocess.Popen(words, stdin=subprocess.DEVNULL)

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        assert self._process is not None
        return self._process.poll()

    def terminate(self) -> None:
        """Tell it to stop; it has its grace."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def kill(self) -> None:
        """End it, and all that it has started, at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()  # before the others: who waits first learns the exit code
            kill_children()


class ContainerGang(GracefulGang):
    """The nodes of a job, as the first container has them; see `Gang`.

    Args:
        node: that of this container.
        port: where the others come to.
    """

    def __init__(self, submission: Submission, node: NodeProcess, port: int) -> None:
        super().__init__(submission)
        self._node = node
        self._lines: dict[int, Line] = {}
        self._codes: dict[int, int | None] = {}
        self._listener = socket.create_server(("", port)) if submission.plan.nodes > 1 else None

    @property
    def lost(self) -> list[int]:
        """Nodes whose containers are gone: nobody starts those again."""
        return sorted(rank for rank, line in self._lines.items() if not line.is_open)

    def meet(self, patience: float = PATIENCE) -> None:
        """Wait for all containers. Raises TimeoutError, ValueError."""
        deadline = time.monotonic() + patience
        missing = set(range(1, self._submission.plan.nodes))
        while missing:
            assert self._listener is not None
            self._listener.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                raise TimeoutError(
                    f"The containers of nodes {sorted(missing)} have not come within {patience:.0f} s."
                ) from None
            line = Line(connection)
            hello = line.messages(MARGIN)
            rank = hello[0].get("rank") if hello else None
            if rank not in missing:
                line.close()
                continue
            self._lines[rank] = line
            missing.remove(rank)

    def _start_nodes(self) -> None:
        if self.lost:
            raise OSError(f"The containers of nodes {self.lost} are gone.")
        self._codes = {}
        for line in self._lines.values():
            line.send(start=self.number)
        self._node.start(self.number)

    def _exit_codes(self) -> ExitCodes | None:
        self._listen()
        code = self._node.poll()
        if code is not None:
            self._codes[0] = code if code >= 0 else None
        ranks = range(self._submission.plan.nodes)
        return tuple(self._codes[rank] for rank in ranks) if len(self._codes) == len(ranks) else None

    def _has_failed(self) -> bool:
        return any(code != 0 for code in self._codes.values())

    def _ask_to_stop(self) -> None:
        for line in self._lines.values():
            line.send(stop=self.number)
        if 0 not in self._codes:
            self._node.terminate()

    def kill(self) -> None:
        """End what is left of all nodes, at once."""
        for line in self._lines.values():
            line.send(kill=self.number)
        self._node.kill()

    def end(self, state: str, reason: str | None) -> None:
        """Tell every container how the job has ended, and hang up."""
        for line in self._lines.values():
            line.send(over={"state": state, "reason": reason})
            line.close()
        if self._listener is not None:
            self._listener.close()

    def _listen(self) -> None:
        for rank, line in self._lines.items():
            for message in line.messages(0.0):
                if message.get("ended") == self.number:
                    self._note_end(rank, message)
            if not line.is_open:
                self._codes.setdefault(rank, None)

    def _note_end(self, rank: int, message: Mapping[str, Any]) -> None:
        """Put what a node wrote to where its own would be: the supervisor reads it there."""
        paths = {
            "exit": self._submission.exit_file(rank, self.number),
            "node": self._submission.node_file(rank, self.number),
        }
        for name, path in paths.items():
            if isinstance(message.get(name), dict):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(message[name]))
        code = message.get("code")
        self._codes[rank] = code if isinstance(code, int) and code >= 0 else None


class Agent:
    """A container that is not the first: does what that one says.

    Args:
        told: whether this container was told to stop.
    """

    def __init__(
        self, submission: Submission, rank: int, node: NodeProcess, told: Callable[[], bool]
    ) -> None:
        self._submission = submission
        self._rank = rank
        self._node = node
        self._told = told
        self._number: int | None = None
        """Of the start that runs."""
        self._stopped_at: float | None = None

    def run(self, host: str, port: int, patience: float = PATIENCE) -> tuple[str, str | None]:
        """Take part until the job is over; gives state and reason. Raises OSError."""
        connection = self._connection(host, port, patience)
        if connection is None:
            return "preempted", "Stopped while no command ran."
        with contextlib.closing(Line(connection)) as line:
            line.send(rank=self._rank)
            try:
                return self._follow(line)
            finally:
                self._node.kill()

    def _connection(self, host: str, port: int, patience: float) -> socket.socket | None:
        """To the first container, once it listens; None where this one is told to stop first."""
        deadline = time.monotonic() + patience
        while True:
            try:
                return socket.create_connection((host, port), timeout=MARGIN)
            except OSError as error:
                if self._told():
                    return None
                if time.monotonic() > deadline:
                    raise OSError(f"The first container, {host!r}, does not answer ({error}).") from error
                time.sleep(POLL)

    def _follow(self, line: Line) -> tuple[str, str | None]:
        while True:
            for message in line.messages(POLL):
                over = message.get("over")
                if isinstance(over, dict):
                    return str(over.get("state")), over.get("reason")
                self._obey(line, message)
            if not line.is_open:
                self._finish()
                if self._told():
                    return "preempted", "Stopped by SageMaker."
                return "failed", "The first container is gone."
            if self._told():
                self._stop()
            self._report(line)

    def _obey(self, line: Line, message: Mapping[str, Any]) -> None:
        if isinstance(message.get("start"), int):
            number = int(message["start"])
            if self._told():
                line.send(ended=number, code=75, node={"exit_code": None, "problem": None, "stopped": True})
                return
            self._number, self._stopped_at = number, None
            self._node.start(number)
        elif "stop" in message:
            self._stop()
        elif "kill" in message:
            self._node.kill()

    def _stop(self) -> None:
        if self._number is not None and self._stopped_at is None:
            self._stopped_at = time.monotonic()
            self._node.terminate()

    def _report(self, line: Line) -> None:
        if self._number is None or (code := self._node.poll()) is None:
            return
        line.send(
            ended=self._number,
            code=code,
            exit=read_end(self._submission.exit_file(self._rank, self._number)),
            node=read_end(self._submission.node_file(self._rank, self._number)),
        )
        self._number = None

    def _finish(self) -> None:
        """Nobody says anything any more: the node has its grace."""
        self._stop()
        deadline = time.monotonic() + self._submission.plan.grace + MARGIN
        while self._number is not None and self._node.poll() is None and time.monotonic() < deadline:
            time.sleep(POLL)


def main() -> None:
    """One node, one start; the command line above."""
    parser = argparse.ArgumentParser(prog="python -m hf_cloudtrain.jobs.engines.sagemaker.gang")
    parser.add_argument("home")
    parser.add_argument("--node-rank", type=int, required=True)
    parser.add_argument("--master-addr", required=True)
    parser.add_argument("--start", type=int, required=True)
    given = parser.parse_args()
    logging.basicConfig(format="cloudtrain: %(message)s", stream=sys.stdout)
    logging.getLogger("hf_cloudtrain").setLevel(logging.INFO)
    submission = Submission.load(Path(given.home))
    # The dataset is there already, and so are the links: nothing is downloaded, and nothing mounted.
    job = submission.job.model_copy(update={"data": None})
    sys.exit(
        run_node(
            dataclasses.replace(submission, job=job),
            node_rank=given.node_rank,
            master_addr=given.master_addr,
            master_port=MASTER_PORT,
            start=given.start,
            wrap=lambda _, mounts, command: command,
        )
    )


if __name__ == "__main__":
    main()
