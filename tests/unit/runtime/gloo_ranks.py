"""One of three real processes that use Ranks, for test_ranks.py."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from hf_cloudtrain.errors import RunHasCheckpointsError
from hf_cloudtrain.runtime import ranks
from hf_cloudtrain.runtime.ranks import Ranks

SIZE = 3
GROUP_SECONDS = 2.0
"""Timeout of all collectives, the user's and ours."""
SLOW_SECONDS = 3.0
"""Duration of work that takes longer than a collective may."""


def told(ask: Callable[[], Any]) -> Any:
    """The answer, or class and message of the error."""
    try:
        return ask()
    except Exception as error:  # noqa: BLE001 - a test checks it
        return [type(error).__name__, str(error)]


def fails(error: Exception) -> Any:
    raise error


def scenarios(ranks: Ranks, folder: Path) -> dict[str, Any]:
    rank = ranks.rank
    found: dict[str, Any] = {"who": [rank, ranks.size, ranks.is_main]}
    found["agree"] = ranks.agree(lambda: f"from {rank}", "think")
    found["each"] = ranks.each(lambda: rank * 10, "think")
    found["agree fails"] = told(lambda: ranks.agree(lambda: fails(RunHasCheckpointsError("it has")), "start"))
    found["each fails"] = told(
        lambda: ranks.each(lambda: fails(OSError("full")) if rank == 1 else rank, "write")
    )
    found["each fails with ours"] = told(
        lambda: ranks.each(lambda: fails(RunHasCheckpointsError("it has")) if rank == 2 else rank, "start")
    )
    found["after errors"] = ranks.each(lambda: rank, "think")

    began = time.monotonic()
    found["slow"] = ranks.agree(lambda: (time.sleep(SLOW_SECONDS), "slept")[1], "sleep")
    assert time.monotonic() - began >= SLOW_SECONDS
    dist.barrier()  # the user's own group still works
    found["the user's group"] = "alive"

    for name, mine in (
        ("one disk", "shared"),
        ("own disks", f"disk-{rank}"),
        ("two disks", f"half-{rank // 2}"),
    ):
        ranks.meet_disks(folder / name / mine)
        found[name] = {
            "leaders": ranks.leaders,
            "neighbours": ranks.neighbours,
            "leads": ranks.is_leader,
            "answers": ranks.each_leader(lambda: rank, "lead"),
            "left": sorted(path.name for path in (folder / name).rglob(".meet-*")),
        }
        ranks.barrier()
    found["no disk"] = told(
        lambda: ranks.meet_disks(Path("/dev/null/nowhere") if rank == 2 else folder / "x")
    )
    found["after no disk"] = ranks.each(lambda: rank, "think")
    return found


def answer(rank: int, folder: str) -> dict[str, Any]:
    ranks.GROUP_TIMEOUT = datetime.timedelta(seconds=GROUP_SECONDS)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=SIZE,
        timeout=ranks.GROUP_TIMEOUT,
    )
    found = scenarios(Ranks.current(), Path(folder))
    dist.destroy_process_group()
    return found
