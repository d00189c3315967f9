"""The torchrun job of `_job.py` with staged saves: the writer of its rank 0 is killed alone or with the job."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hf_cloudtrain.checkpoints.frozen import OutboxEntry
from hf_cloudtrain.staging import recorders
from hf_cloudtrain.staging.saves import AsyncSaves
from tests.chaos import _job, _staged
from tests.chaos._chaos import KILLED, STAGED
from tests.chaos._job import PHASES, RANKS, difference, plain
from tests.faults.staged import writer_program

WRITER = {phase: seam for phase, seam in _staged.WRITER.items() if phase not in _staged.AFTER}
"""What the writer does while the job lives."""

__all__ = ["PHASES", "RANKS", "WRITER", "attempt", "difference", "plain"]


def attempt(
    output_dir: str, run_url: str, state: str, result: str, hurry: float, aim: dict[str, Any] | None = None
) -> None:
    """One start of the job, whose ranks are forked from this process."""
    handed, take = Path(state).with_name(STAGED), AsyncSaves.take

    def noted(self: AsyncSaves, folder: Path, entry: OutboxEntry, *rest: Any) -> bool:
        taken = take(self, folder, entry, *rest)
        if taken:
            with open(handed, "a") as file:
                file.write(f"{entry.key.attempt} {entry.key.step}\n")
        return taken

    AsyncSaves.take = noted  # type: ignore[method-assign]
    recorders.SMALL_FILE = 0
    os.environ["HF_CLOUDTRAIN_ASYNC_SAVE"] = "1"
    home, lines = Path(state).parent, []
    if aim is not None and aim["phase"] in WRITER:
        aimed = {name: value for name, value in aim.items() if name != "rank"}
        lines = ["from tests.chaos import _staged", f"_staged.watch_writer({aimed!r}, {str(home)!r})"]
        aim = None
    with writer_program(*lines, unless=home / KILLED):
        _job.attempt(output_dir, run_url, state, result, hurry, aim)
