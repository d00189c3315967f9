"""Runs as their records tell them: what a training would have written, without the training."""

from __future__ import annotations

import json
import math
from typing import Any

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.manifest import CheckpointKey, FileEntry, Manifest, Position
from hf_cloudtrain.tracking.records import StepRecords

BEGAN = 1_795_000_000.0
"""Seconds since 1970: any day."""
FACTS = {
    "host": "gpu-07",
    "python": "3.11.7",
    "torch": "2.13.0",
    "command": "train.py --lr 1e-4",
    "pid": "412",
}


def record_attempt(
    catalog: Catalog,
    *,
    began: float,
    steps: range,
    resumed_from: CheckpointKey | None = None,
    state: str = "training",
    step_seconds: float = 0.5,
    save_steps: int = 50,
    log_steps: int = 5,
    total: int = 400,
    start_seconds: float = 12.0,
    lag: float = 8.0,
    stall_at: int | None = None,
    facts: dict[str, str] | None = None,
    decay_steps: float = 120.0,
) -> int:
    """One attempt that did `steps`: a save and an evaluation every `save_steps`; returns its number."""
    number = catalog.attempts.begin(began, steps.start - 1, resumed_from, facts or FACTS).number
    now = began + start_seconds
    lines: list[dict[str, Any]] = [
        {"kind": "pause", "step": steps.start - 1, "why": "start", "time": began, "seconds": start_seconds}
    ]
    committed = None
    for step in steps:
        seconds = 90.0 if step == stall_at else step_seconds * (1 + 0.2 * math.sin(step))
        now += seconds
        lines.append({"kind": "steps", "first": step, "seconds": [round(seconds, 6)], "time": now})
        if step % log_steps == 0:
            loss = 2.5 * math.exp(-step / decay_steps) + 0.2 + 0.05 * math.sin(step * 1.7)
            rate = 1e-4 * (1 - step / total)
            lines.append({"kind": "log", "step": step, "time": now, "loss": loss, "learning_rate": rate})
        if step % save_steps == 0:
            found = {
                "eval_loss": 2.4 * math.exp(-step / 130) + 0.3,
                "eval_accuracy": 1 - math.exp(-step / 200),
            }
            lines.append({"kind": "pause", "step": step, "why": "evaluation", "time": now, "seconds": 6.0})
            now += 6.0
            lines.append({"kind": "log", "step": step, "time": now, **found})
            committed = CheckpointKey(number, step)
            commit(catalog, committed, now)
            lines.append(
                {
                    "kind": "commit",
                    "checkpoint": str(committed),
                    "saved": now,
                    "time": now + lag,
                    "size": 438_000_000,
                }
            )
    write(catalog, number, lines)
    beat = {"attempt": number, "state": state, "time": now, "step": steps.stop - 1, "total_steps": total}
    beat |= {"step_seconds": step_seconds, "last_committed": committed and str(committed), "loss": 0.31}
    catalog.attempts.write_progress(number, beat)
    return number


def record_run(catalog: Catalog) -> None:
    """Three attempts: killed after 170 of 400 steps, failed at 260 after a stall, finished."""
    record_attempt(catalog, began=BEGAN, steps=range(1, 171))
    record_attempt(
        catalog,
        began=BEGAN + 260,
        steps=range(151, 261),
        resumed_from=CheckpointKey(1, 150),
        state="failed",
        stall_at=220,
    )
    record_attempt(
        catalog,
        began=BEGAN + 520,
        steps=range(251, 401),
        resumed_from=CheckpointKey(2, 250),
        state="finished",
        facts={**FACTS, "host": "gpu-12"},
    )
    catalog.point("best", CheckpointKey(2, 200), 0.4)


def commit(catalog: Catalog, key: CheckpointKey, created: float, **more: Any) -> None:
    """Commit a manifest without its files."""
    files = tuple(
        FileEntry(name, size, "xxh3-128:" + "0" * 32)
        for name, size in (("model.safetensors", 438_000_000), ("optimizer.pt", 2_000_000))
    )
    position = Position(
        key.step, epoch=key.step / 100, world_size=4, per_device_train_batch_size=16, max_steps=400
    )
    values = {
        "folder": f"checkpoint-{key.step}",
        "metrics": {"loss": 0.5},
        "origin": {"torch": "2.13.0", "hf_cloudtrain": "0.1.0"},
        **more,
    }
    name = f"{key.attempt}-{key.step}"
    catalog.commit(
        Manifest(
            str(key),
            attempt=key.attempt,
            step=key.step,
            nonce=name,
            files=files,
            position=position,
            created=created,
            **values,
        )
    )


def write(catalog: Catalog, number: int, records: list[dict[str, Any]], batch: int = 1) -> None:
    """Step and metric records."""
    StepRecords(catalog.storage).write(
        number, batch, "".join(json.dumps(item) + "\n" for item in records).encode()
    )
