"""One process of a loop that passes through several topologies: what it saw, and at which learning rate."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hf_cloudtrain.integrations.loop.loop import TrainLoop
from hf_cloudtrain.staging import recorders
from tests.integration._loops import KilledError, Rows, StatefulStream, Stream, train
from tests.integration._staged import count_saves


class Counted(Stream):
    """A stream with a length, and without a state."""

    def __len__(self) -> int:
        return len(self.rows)


class StatefulCounted(StatefulStream):
    """A stream with both."""

    def __len__(self) -> int:
        return len(self.rows)


DATA: dict[str, Callable[[int], Any]] = {
    "rows": Rows,
    "stream": Stream,
    "counted": Counted,
    "stateful": StatefulCounted,
}


def attempt(
    output_dir: str,
    *,
    run_url: str,
    samples: int = 24,
    data: str = "rows",
    noise: bool = False,
    inside: Callable[[TrainLoop], None] = lambda loop: None,
    result: str = "",
    seen: str = "",
    **arguments: Any,
) -> dict[str, Any]:
    """Train as `_loops.train` does.

    Args:
        result, seen: for Lab, and not used.
    """
    rates: list[float] = []
    scales: list[Any] = []

    def note(loop: TrainLoop) -> None:
        inside(loop)
        rates.append(loop.accelerator._optimizers[0].param_groups[0]["lr"])

    def prepared(accelerator: Any) -> None:
        scales.extend(scheduler.scheduler for scheduler in accelerator._schedulers)

    try:
        weights, batches, loop = train(
            Path(run_url),
            Path(output_dir),
            DATA[data](samples, noise=noise),
            inside=note,
            prepared=prepared,
            **arguments,
        )
    except KilledError as killed:
        return {"seen": killed.args[0], "rates": rates}
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return {
        "seen": batches,
        "rates": rates,
        "step": loop.global_step,
        "schedule": scales[0].last_epoch,
        "weights": {name: value.tolist() for name, value in weights.items()},
    }


def staged_attempt(output_dir: str, *, hold_at: int | None = None, **arguments: Any) -> dict[str, Any]:
    """`attempt` with all saves staged, however small.

    Args:
        hold_at: within the step after this one, it waits to be killed.
    """
    recorders.SMALL_FILE = 0
    count = count_saves()

    def inside(loop: TrainLoop) -> None:
        if loop.global_step == hold_at:
            Path(output_dir).with_name("held").touch()
            time.sleep(600)

    return {
        **attempt(output_dir, inside=inside, async_save=True, **arguments),
        "staged": count,
    }
