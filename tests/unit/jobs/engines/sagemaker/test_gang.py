"""Several containers: they start, stop and end together."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from pathlib import Path

import pytest

from hf_cloudtrain.jobs.engines.sagemaker import container
from hf_cloudtrain.jobs.engines.sagemaker.container_main import main
from hf_cloudtrain.jobs.engines.sagemaker.gang import MAX_LINE, Agent, Connection, ContainerGang
from hf_cloudtrain.jobs.submission import Submission
from tests.unit.jobs.engines.sagemaker._container import FakeNode, Image, hosts, job


class Others:
    """The containers of nodes 1 and 2, each a thread."""

    def __init__(self, image: Image, tmp_path: Path) -> None:
        hosts(image, ["algo-1", "algo-2", "algo-3"], "algo-1")
        job(image, 3)
        given = json.loads((image.root / "input/data/cloudtrain/job.json").read_text())
        self.ends: dict[int, tuple[str, str | None] | Exception] = {}
        self.stopped: set[int] = set()
        self.nodes = {
            rank: FakeNode(Submission.decode(given, tmp_path / f"home-{rank}"), rank, "algo-1")
            for rank in (1, 2)
        }
        self._threads = [threading.Thread(target=self._run, args=(rank,)) for rank in self.nodes]

    def __enter__(self) -> Others:  # noqa: PYI034 - typing.Self came with Python 3.11
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()

    def _run(self, rank: int) -> None:
        node = self.nodes[rank]
        agent = Agent(node.submission, rank, node, lambda: rank in self.stopped and bool(FakeNode.starts))  # type: ignore[arg-type]
        try:
            self.ends[rank] = agent.run("127.0.0.1", container.PORT, patience=20.0)
        except Exception as error:  # noqa: BLE001 - the test looks at it
            self.ends[rank] = error


def test_a_crash_of_one_node_stops_and_restarts_all(image: Image, tmp_path: Path) -> None:
    FakeNode.endings = {0: ["stuck", "finished"], 1: [9, "finished"], 2: ["stuck", "finished"]}
    with Others(image, tmp_path) as others:
        assert main(image.root) == 0
    assert sorted(FakeNode.starts) == [(rank, start) for rank in range(3) for start in (1, 2)]
    assert others.ends == {1: ("finished", None), 2: ("finished", None)}
    record = image.store.read("small-1")
    assert (record.state, record.restarts) == ("finished", 1)
    assert [start.exit_codes for start in record.starts] == [(1, 9, 1), (0, 0, 0)]


def test_every_container_receives_the_end_of_the_job(image: Image, tmp_path: Path) -> None:
    FakeNode.endings = {rank: [1, 1, 1] for rank in range(3)}
    with Others(image, tmp_path) as others:
        assert main(image.root) == 1
    assert set(others.ends) == {1, 2}
    for end in others.ends.values():
        assert isinstance(end, tuple)
        assert end[0] == "failed"
        assert "ended with exit code 1. It was restarted 2 times" in (end[1] or "")


def test_the_exit_files_of_other_containers_count(image: Image, tmp_path: Path) -> None:
    """Only node 2 knows that the training finished: its exit file is on a different machine."""
    FakeNode.endings = {0: [0], 1: [0], 2: ["finished"]}
    with Others(image, tmp_path):
        assert main(image.root) == 0


def test_a_container_that_was_asked_to_stop_starts_nothing_more(image: Image, tmp_path: Path) -> None:
    """After three starts without a step the job ends, as on every engine."""
    FakeNode.endings = {rank: ["hold"] * 3 for rank in range(3)}
    with Others(image, tmp_path) as others:
        others.stopped.add(1)
        assert main(image.root) == 75
    others_starts = sorted(start for start in FakeNode.starts if start[0] != 1)
    assert others_starts == [(rank, start) for rank in (0, 2) for start in (1, 2, 3)]
    assert (1, 2) not in FakeNode.starts
    assert image.store.read("small-1").state == "preempted"


def test_the_others_end_when_the_first_container_is_gone(image: Image, tmp_path: Path) -> None:
    FakeNode.endings = {1: ["hold"], 2: ["hold"]}
    with Others(image, tmp_path) as others:
        submission = others.nodes[1].submission
        gang = ContainerGang(submission, FakeNode(submission, 0, "algo-1"), container.PORT)  # type: ignore[arg-type]
        gang.meet()
        for other in gang._others.values():
            other.send(start=1)
        while len(FakeNode.starts) < 2:
            time.sleep(0.01)
        for other in gang._others.values():
            other.close()
        assert gang._listener is not None
        gang._listener.close()
    assert others.ends == dict.fromkeys((1, 2), ("failed", "The first container is gone."))
    assert {node.code for node in others.nodes.values()} == {75}  # each had its grace


def test_the_job_fails_when_a_container_is_gone(image: Image, tmp_path: Path) -> None:
    """SageMaker ends the training job then; no node is restarted that would wait for the lost one."""
    FakeNode.endings = {0: ["hold"], 1: ["hold"], 2: ["hold"]}

    class Dying(FakeNode):
        def start(self, number: int) -> None:
            raise RuntimeError("killed")

    with Others(image, tmp_path) as others:
        others.nodes[2].__class__ = Dying
        assert main(image.root) == 1
    assert "The containers of these nodes are gone: 2." in (image.failure() or "")
    assert image.store.read("small-1").state == "failed"


@pytest.mark.parametrize("stopped", [True, False])
def test_a_container_that_cannot_connect_to_the_first_one_ends(image: Image, stopped: bool) -> None:
    submission = Submission.decode(
        json.loads((image.root / "input/data/cloudtrain/job.json").read_text()), image.root
    )
    agent = Agent(submission, 1, FakeNode(submission, 1, "algo-1"), lambda: stopped)  # type: ignore[arg-type]
    if stopped:
        assert agent.run("127.0.0.1", container.PORT, patience=20.0)[0] == "preempted"
    else:
        with pytest.raises(OSError, match="'127\\.0\\.0\\.1', does not answer"):
            agent.run("127.0.0.1", container.PORT, patience=0.0)
    assert FakeNode.starts == []


def test_containers_that_do_not_connect_are_named(image: Image, tmp_path: Path) -> None:
    hosts(image, ["algo-1", "algo-2"], "algo-1")
    job(image, 2)
    given = json.loads((image.root / "input/data/cloudtrain/job.json").read_text())
    submission = Submission.decode(given, tmp_path / "home")
    gang = ContainerGang(submission, FakeNode(submission, 0, "algo-1"), container.PORT)  # type: ignore[arg-type]
    with pytest.raises(TimeoutError, match=r"nodes \[1\] did not connect"):
        gang.meet(patience=0.0)
    gang.end("failed", None)


@pytest.mark.parametrize("sent", [b"[1]\n", b"{\n", b"x" * (MAX_LINE + 2)])
def test_a_malformed_message_is_refused(sent: bytes) -> None:
    near, far = socket.socketpair()
    with near, far:
        thread = threading.Thread(target=far.sendall, args=(sent,))
        thread.start()
        connection = Connection(near)
        with pytest.raises(ValueError, match=r"object|Expecting|too long"):
            all(connection.messages(1.0) == [] for _ in range(100))
        near.close()
        with contextlib.suppress(OSError):
            thread.join(10)
