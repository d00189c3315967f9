"""Trainer on two hosts that share no disk: each rank has an output folder of its own."""

from __future__ import annotations

import signal
from typing import Any

from tests.integration._lab import Lab
from tests.integration._zygote import Child
from tests.integration.test_trainer_ranks import finish
from tests.servers import free_port


def start_hosts(lab: Lab, machine: str, function: str = "train", **arguments: Any) -> list[Child]:
    """A rank a host; the disks are `<machine>-0` and `<machine>-1`."""
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        lab.start(
            machine,
            function,
            env={**shared, "RANK": str(rank)},
            output_dir=lab.machine(f"{machine}-{rank}"),
            **({"save_on_each_node": True} if function == "train" else {}),
            **arguments,
        )
        for rank in range(2)
    ]


def test_law_7_hosts_killed_and_resumed_on_empty_disks_equal_uninterrupted(lab: Lab) -> None:
    """Both write optimizer and state; both need all files except the random states of the other rank."""
    finish(lab.start_ranks("plain", run_url=None))
    ranks = start_hosts(lab, "first", kill_at=6, committed=4)
    assert [rank.wait() for rank in ranks] == [-signal.SIGKILL] * 2, "\n".join(rank.log for rank in ranks)
    for rank in range(2):
        assert (lab.machine(f"first-{rank}") / "checkpoint-4/optimizer.pt").exists()
    finish(start_hosts(lab, "second"))
    assert lab.difference("second") == 0.0
    names = [entry.path for entry in lab.manifest(1, 4).files]
    assert sorted(names) == sorted(set(names))
    assert {
        "model.safetensors",
        "optimizer.pt",
        "trainer_state.json",
        "rng_state_0.pth",
        "rng_state_1.pth",
    } <= set(names)
    for rank in range(2):
        restored = {path.name for path in lab.machine(f"second-{rank}").glob("checkpoint-4/*")}
        assert {"model.safetensors", "optimizer.pt", f"rng_state_{rank}.pth"} <= restored
        assert f"rng_state_{1 - rank}.pth" not in restored
    assert lab.problems() == []
