"""The conversation of the containers: the first one tells the others when to start and to stop their nodes.

other -> first    {"rank": 1}, and {"ended": 1, "code": 0, "exit": {…}, "node": {…}} with what the node wrote
first -> other    {"start": 1}, {"stop": 1}, {"kill": 1}, {"over": {"state": "finished", "reason": null}}
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

from hf_cloudtrain.jobs.engines.sagemaker.node_main import NodeProcess
from hf_cloudtrain.jobs.engines.sagemaker.stop_signal import STOPPED_EARLY
from hf_cloudtrain.jobs.gang import ExitCodes, Gang
from hf_cloudtrain.jobs.node.stopping import MARGIN
from hf_cloudtrain.jobs.submission import Submission
from hf_cloudtrain.tracking.exit_record import read_end

PORT = 7778
"""Where the containers meet."""
PATIENCE = 600.0
"""Seconds for all containers to connect. They start together, and each has its channels by then."""
POLL = 0.1
"""Seconds of one wait for a message."""
MAX_LINE = 2**20
"""Bytes of a message: a reason can be a traceback."""


class Connection:
    """Messages to and from one container: one JSON object a line, over TCP."""

    def __init__(self, connected: socket.socket) -> None:
        self.is_open = True
        self._socket = connected
        self._rest = b""

    def send(self, **message: Any) -> None:
        """Send a message; if the other container is gone, the connection is no longer open."""
        try:
            self._socket.settimeout(MARGIN)
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self.is_open = False

    def messages(self, seconds: float) -> list[dict[str, Any]]:
        """The messages that arrive within some seconds. Raises ValueError for a malformed one."""
        if not self.is_open:
            return []
        self._socket.settimeout(max(seconds, 0.001))
        try:
            data = self._socket.recv(65536)
        except TimeoutError:
            return []
        except OSError:
            data = b""
        self.is_open = bool(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_LINE:
            raise ValueError("a message is too long")
        found = [json.loads(line) for line in lines]
        if not all(isinstance(message, dict) for message in found):
            raise ValueError("a message is not a JSON object")
        return found

    def close(self) -> None:
        """Close it."""
        self.is_open = False
        self._socket.close()


class ContainerGang(Gang):
    """The nodes of a job, as the first container has them; see `Gang`.

    Args:
        node: that of the first container.
        port: where the others connect.
    """

    def __init__(self, submission: Submission, node: NodeProcess, port: int) -> None:
        super().__init__(submission)
        self._node = node
        self._others: dict[int, Connection] = {}
        self._codes: dict[int, int | None] = {}
        self._listener = socket.create_server(("", port)) if submission.plan.nodes > 1 else None

    @property
    def lost(self) -> list[int]:
        """Nodes whose containers are gone; no process restarts those."""
        return sorted(rank for rank, other in self._others.items() if not other.is_open)

    def meet(self, patience: float = PATIENCE) -> None:
        """Wait for all containers. Raises TimeoutError, ValueError."""
        deadline = time.monotonic() + patience
        missing = set(range(1, self._submission.plan.nodes))
        while missing:
            assert self._listener is not None
            self._listener.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connected, _ = self._listener.accept()
            except TimeoutError:
                raise TimeoutError(
                    f"The containers of nodes {sorted(missing)} did not connect within {patience:.0f} s."
                ) from None
            other = Connection(connected)
            hello = other.messages(MARGIN)
            rank = hello[0].get("rank") if hello else None
            if rank not in missing:
                other.close()
                continue
            self._others[rank] = other
            missing.remove(rank)

    def _start_nodes(self) -> None:
        if self.lost:
            raise OSError(f"The containers of nodes {self.lost} are gone.")
        self._codes = {}
        self._send(start=self.number)
        self._node.start(self.number)

    def _exit_codes(self) -> ExitCodes | None:
        self._receive()
        code = self._node.poll()
        if code is not None:
            self._codes[0] = code if code >= 0 else None
        ranks = range(self._submission.plan.nodes)
        return tuple(self._codes[rank] for rank in ranks) if len(self._codes) == len(ranks) else None

    def _has_failed(self) -> bool:
        return any(code != 0 for code in self._codes.values())

    def _ask_to_stop(self) -> None:
        self._send(stop=self.number)
        if 0 not in self._codes:
            self._node.terminate()

    def kill(self) -> None:
        """End what is left of all nodes, at once."""
        self._send(kill=self.number)
        self._node.kill()

    def end(self, state: str, reason: str | None) -> None:
        """Tell every container how the job has ended, and close the connections."""
        self._send(over={"state": state, "reason": reason})
        for closing in (*self._others.values(), self._listener):
            if closing is not None:
                closing.close()

    def _send(self, **message: Any) -> None:
        for other in self._others.values():
            other.send(**message)

    def _receive(self) -> None:
        for rank, other in self._others.items():
            for message in other.messages(0.0):
                if message.get("ended") == self.number:
                    self._note_end(rank, message)
            if not other.is_open:
                self._codes.setdefault(rank, None)

    def _note_end(self, rank: int, message: Mapping[str, Any]) -> None:
        """Write a node's files to where the supervisor reads them."""
        files = {
            "exit": self._submission.exit_file(rank, self.number),
            "node": self._submission.node_file(rank, self.number),
        }
        for name, path in files.items():
            if isinstance(message.get(name), dict):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(message[name]))
        code = message.get("code")
        self._codes[rank] = code if isinstance(code, int) and code >= 0 else None


class Agent:
    """A container that is not the first: it runs its node as the first one says, until the job is over.

    Args:
        stop_received: whether this container was asked to stop.
    """

    def __init__(
        self, submission: Submission, rank: int, node: NodeProcess, stop_received: Callable[[], bool]
    ) -> None:
        self._submission = submission
        self._rank = rank
        self._node = node
        self._stop_received = stop_received
        self._number: int | None = None
        """Number of the start that runs."""
        self._is_stopping = False

    def run(self, host: str, port: int, patience: float = PATIENCE) -> tuple[str, str | None]:
        """Take part until the job is over; return its state and reason. Raises OSError."""
        connected = self._connect(host, port, patience)
        if connected is None:
            return STOPPED_EARLY
        with contextlib.closing(Connection(connected)) as first:
            first.send(rank=self._rank)
            try:
                return self._follow(first)
            finally:
                self._node.kill()

    def _connect(self, host: str, port: int, patience: float) -> socket.socket | None:
        """Connect to the first container once it listens; None if this one is asked to stop before that."""
        deadline = time.monotonic() + patience
        while True:
            try:
                return socket.create_connection((host, port), timeout=MARGIN)
            except OSError as error:
                if self._stop_received():
                    return None
                if time.monotonic() > deadline:
                    raise OSError(f"The first container, {host!r}, does not answer ({error}).") from error
                time.sleep(POLL)

    def _follow(self, first: Connection) -> tuple[str, str | None]:
        while True:
            for message in first.messages(POLL):
                over = message.get("over")
                if isinstance(over, dict):
                    return str(over.get("state")), over.get("reason")
                self._obey(first, message)
            if not first.is_open:
                self._wait_out_grace()
                if self._stop_received():
                    return "preempted", "Stopped by SageMaker."
                return "failed", "The first container is gone."
            if self._stop_received():
                self._stop()
            self._report(first)

    def _obey(self, first: Connection, message: Mapping[str, Any]) -> None:
        if isinstance(message.get("start"), int):
            number = int(message["start"])
            if self._stop_received():
                first.send(ended=number, code=75, node={"exit_code": None, "problem": None, "stopped": True})
                return
            self._number, self._is_stopping = number, False
            self._node.start(number)
        elif "stop" in message:
            self._stop()
        elif "kill" in message:
            self._node.kill()

    def _stop(self) -> None:
        if self._number is not None and not self._is_stopping:
            self._is_stopping = True
            self._node.terminate()

    def _report(self, first: Connection) -> None:
        if self._number is None or (code := self._node.poll()) is None:
            return
        first.send(
            ended=self._number,
            code=code,
            exit=read_end(self._submission.exit_file(self._rank, self._number)),
            node=read_end(self._submission.node_file(self._rank, self._number)),
        )
        self._number = None

    def _wait_out_grace(self) -> None:
        """Stop the node, which has its grace, without the first container."""
        self._stop()
        deadline = time.monotonic() + self._submission.plan.grace + MARGIN
        while self._number is not None and self._node.poll() is None and time.monotonic() < deadline:
            time.sleep(POLL)
