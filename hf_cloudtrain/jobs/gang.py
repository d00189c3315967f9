"""The nodes of a job as one unit: they start together, a node that fails stops the others, and none outlives its grace."""

from __future__ import annotations

import abc
import time

from hf_cloudtrain.jobs.node.stopping import MARGIN
from hf_cloudtrain.jobs.submission import Submission

ExitCodes = tuple[int | None, ...]
"""Exit codes by node rank; None for a node that was killed or lost."""


class Gang(abc.ABC):
    """The nodes of a job, as the supervisor sees them, and the grace that they have to stop.

    The gang of an engine says how its nodes are started, asked to stop and killed, and how it learns that they have ended.
    """

    def __init__(self, submission: Submission) -> None:
        self._submission = submission
        self._stopped_at: float | None = None
        """When the nodes of this start were asked to stop."""
        self.number = 0
        """Number of the last start."""

    def start(self, number: int) -> None:
        """Start every node, for the number-th time; returns at once. Raises OSError."""
        self.number = number
        self._stopped_at = None
        self._start_nodes()

    def poll(self) -> ExitCodes | None:
        """The exit codes once all nodes have ended, else None. Stops the others if one has failed; kills after the grace."""
        codes = self._exit_codes()
        if codes is not None:
            return codes
        if self._stopped_at is None:
            if self._has_failed():
                self.stop()
        elif time.monotonic() > self._stopped_at + self._submission.plan.grace + 2 * MARGIN:
            self.kill()
        else:
            self._remind()
        return None

    def stop(self) -> None:
        """Ask every node to stop; each has its grace. Does nothing if they were asked already."""
        if self._stopped_at is None:
            self._stopped_at = time.monotonic()
            self._ask_to_stop()

    @abc.abstractmethod
    def kill(self) -> None:
        """Kill the nodes that still run, at once."""

    @abc.abstractmethod
    def _start_nodes(self) -> None:
        """Start every node for the start `number`. Raises OSError."""

    @abc.abstractmethod
    def _exit_codes(self) -> ExitCodes | None:
        """The exit codes once all nodes have ended, else None."""

    @abc.abstractmethod
    def _has_failed(self) -> bool:
        """Whether a node has ended with an exit code other than 0 while others still run."""

    @abc.abstractmethod
    def _ask_to_stop(self) -> None:
        """Ask every node to stop."""

    def _remind(self) -> None:
        """Ask again, where a request can get lost; called at each poll during the grace."""
        return
