"""How an attempt ended, as a file for the program that started the process.

Launchers turn every exit code into 1, so this goes to the file that `HF_CLOUDTRAIN_EXIT_FILE` names:

    {"outcome": "preempted", "reason": "SIGTERM", "run_url": "s3://bucket/runs/mrpc", "attempt": 2, "step": 150,
     "saved": "000002-0000000150", "committed": "000002-0000000150"}

`outcome` is `finished`, `stopped`, `preempted`, `overtaken` or `failed`; `committed` is the newest checkpoint that this
process knows to be committed. Each host has its own file. That of a server is `{"served": true}` once it answers.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Literal

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
from hf_cloudtrain.errors import OvertakenError
from hf_cloudtrain.runtime.files import write_whole

logger = logging.getLogger(__name__)

Outcome = Literal["finished", "stopped", "preempted", "overtaken", "failed"]


def record_end(checkpointer: Checkpointer, outcome: Outcome, reason: str | None = None) -> None:
    """Write the exit file atomically, if one is configured; one rank of each disk writes it."""
    name = env.exit_file()
    if name is None or not checkpointer.ranks.is_leader:
        return
    saved, committed = checkpointer.last_saved, checkpointer.uploads.last_committed
    record = {
        "outcome": outcome,
        "reason": reason,
        "run_url": checkpointer.storage.url,
        "attempt": None if checkpointer.attempt is None else checkpointer.attempt.number,
        "step": None if saved is None else saved.step,
        "saved": None if saved is None else str(saved),
        "committed": None if committed is None else str(committed),
    }
    _write(name, record)


def record_served() -> None:
    """Write into the exit file, if one is configured, that this process answers requests: its start did not fail.

    How a training of the same command ended stays there.
    """
    name = env.exit_file()
    if name is not None and not Path(name).exists():
        _write(name, {"served": True})


def _write(name: str, record: dict[str, Any]) -> None:
    path = Path(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, f"{json.dumps(record)}\n".encode())
    except OSError as error:
        logger.error("Cannot write the exit file %r: %s", name, error)


def read_end(path: Path) -> dict[str, Any] | None:
    """The record in an exit file; None if it is missing or unreadable."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def outcome_of(error: BaseException) -> Outcome:
    """The outcome of a training that ends with this error; `break` closes a generator."""
    if isinstance(error, (KeyboardInterrupt, GeneratorExit)):
        return "stopped"
    return "overtaken" if isinstance(error, OvertakenError) else "failed"


def forget_end() -> None:
    """Delete the exit file of an earlier attempt: a process that is killed cannot replace it."""
    name = env.exit_file()
    if name is not None:
        Path(name).unlink(missing_ok=True)
