"""Sharded checkpoints: FSDP2 saved by torch.distributed.checkpoint, on one host and on two. The example is what runs."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from hf_cloudtrain.checkpoints.deletion import retire
from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.checkpoints.outbox import Outbox
from tests.integration._lab import Lab, max_difference
from tests.integration._zygote import PATIENCE, Child
from tests.servers import free_port

SCRIPT = "tests.integration._fsdp_ranks"
STEPS, HELD = 12, 10
"""It saves every fourth step, so HELD is two steps after a save."""


class Shards:
    """Attempts of one run by the example."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.folder = lab.folder

    def start(self, machine: str, *, size: int = 2, **arguments: Any) -> list[Child]:
        """One process a rank, all on one disk."""
        shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        given = self.arguments(machine, **arguments)
        return [
            self.lab._zygote.start(
                SCRIPT, "main", env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, **given
            )
            for rank in range(size)
        ]

    def agents(self, machine: str, **arguments: Any) -> list[Child]:
        """Two torchruns with a rank each, which have a disk each: `<machine>-0` and `<machine>-1`, by rank."""
        rendezvous = f"127.0.0.1:{free_port()}"
        argv = ["--nnodes", "2", "--nproc_per_node", "1", "--max_restarts", "0", "--rdzv_backend", "static"]
        argv += ["--master_addr", "127.0.0.1", "--master_port", rendezvous.rpartition(":")[2]]
        given = self.arguments(machine, checkpoint_dir=f"{self.folder}/{machine}-{{rank}}", **arguments)
        return [
            self.lab._zygote.start(
                SCRIPT,
                "agent",
                argv=[*argv, "--node_rank", str(host), "-m", SCRIPT, json.dumps(given)],
            )
            for host in range(2)
        ]

    def arguments(self, machine: str, **changes: Any) -> dict[str, Any]:
        return {
            "run_url": self.lab.run_url,
            "checkpoint_dir": str(self.folder / machine),
            "steps": STEPS,
            "result": str(self.result(machine)),
            **changes,
        }

    def plain(self) -> list[list[float]]:
        """The same training, uninterrupted, without a run; the losses of each rank."""
        return finish(self.start("plain", run_url=None))

    def wait_for_commit(self, step: int, processes: list[Child]) -> None:
        self.lab.wait_until(
            lambda: step in self.lab.steps() or any(child.poll() is not None for child in processes)
        )
        assert [child.poll() for child in processes] == [None] * len(processes), logs(processes)

    def result(self, machine: str) -> Path:
        return self.folder / f"{machine}.safetensors"


@pytest.fixture
def shards(lab: Lab) -> Shards:
    return Shards(lab)


@pytest.mark.slow
def test_killed_and_resumed_on_the_same_and_on_a_different_number_of_ranks(shards: Shards) -> None:
    plain = shards.plain()
    ranks = shards.start("first", hold={"step": HELD, "rank": 1})
    shards.wait_for_commit(8, ranks)
    for rank in ranks:
        rank.kill()

    before = {str(size): shards.folder / f"loaded-{size}.safetensors" for size in (1, 2)}
    alone = finish(shards.start("alone", size=1, loaded=str(before["1"])))
    # A run of its own, from the same checkpoint.
    retire(shards.lab.catalog, CheckpointKey(2, STEPS))
    together = finish(shards.start("together", loaded=str(before["2"])))

    assert max_difference(shards.result("together"), shards.result("plain")) == 0.0
    assert [losses[8:] for losses in plain] == together
    assert max_difference(before["1"], before["2"]) == 0.0, "DCP redistributes the shards"
    mean = [sum(pair) / 2 for pair in zip(*plain, strict=True)]
    assert alone[0] == pytest.approx(mean[8:], rel=1e-3)
    files = {entry.path for entry in shards.lab.manifest(1, 8).files}
    assert files == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    assert shards.lab.problems() == []


@pytest.mark.slow
def test_of_two_torchruns_without_a_shared_disk_one_is_killed_and_both_restart_on_empty_disks(
    shards: Shards,
) -> None:
    shards.plain()
    first = shards.agents("first", hold={"step": HELD, "rank": 1})
    shards.wait_for_commit(8, first)
    assert [files_in(shards.folder / f"first-{host}") for host in range(2)] == [
        {".metadata", "__0_0.distcp"},
        {"__1_0.distcp"},
    ]
    kill_with_children(first[1])
    assert first[0].wait() != 0, "it does not go on alone"

    second = shards.agents("second")
    finish(second)
    assert max_difference(shards.result("second"), shards.result("plain")) == 0.0
    assert [attempt.resumed_from for attempt in shards.lab.catalog.attempts.read_all()] == [
        None,
        CheckpointKey(1, 8),
    ]
    for step in (8, STEPS):
        files = {entry.path for entry in shards.lab.manifest(1 if step == 8 else 2, step).files}
        assert files == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    assert shards.lab.problems() == []
    for host in range(2):
        assert Outbox(shards.folder / f"second-{host}").entries() == []


def finish(processes: list[Child]) -> list[Any]:
    assert [child.wait() for child in processes] == [0] * len(processes), logs(processes)
    return [child.value for child in processes]


def logs(processes: list[Child]) -> str:
    return "\n".join(child.log for child in processes)


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


def kill_with_children(child: Child) -> None:
    """As when a machine goes away: torchrun's workers are in sessions of their own."""
    agent = psutil.Process(child.pid)
    agent.suspend()  # it must not start anything while we look
    family = agent.children(recursive=True)
    for process in family:
        process.kill()
    assert child.kill() == -signal.SIGKILL
    psutil.wait_procs(family, PATIENCE)
