"""Local checkpoints ahead of where an attempt begins: they would be written into, or be taken for new ones.

They move to `<output_dir>/.cloudtrain/stale/`, for a person to look at. Of the run's own ones only those stay that were
moved last, so that a disk on which a run is killed again and again does not fill up. What was in the folder before the run
first began there is somebody else's, and stays.

    <output_dir>/.cloudtrain/stale.json   which run was here last, and what of its own it has moved
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from hf_cloudtrain.checkpoints.download import move_aside
from hf_cloudtrain.checkpoints.manifest import decode_record, encode_record
from hf_cloudtrain.errors import ManifestError
from hf_cloudtrain.storage.names import META

logger = logging.getLogger(__name__)


def move_stale(
    output_dir: Path, run_url: str, global_step: int, refuse: Callable[[], None] = lambda: None
) -> None:
    """Move what is ahead of `global_step` out of the way of an attempt that begins after it.

    Args:
        refuse: asked before each; raises where a newer attempt has begun, which on a shared disk may have saved it.
    """
    before = _record(output_dir)
    ours = before.get("run_url") == run_url
    moved = []
    for folder in output_dir.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        if match and int(match[1]) > global_step and folder.is_dir():
            refuse()
            logger.warning(
                "%s is ahead of step %d where this attempt begins: moved to %s.",
                folder,
                global_step,
                move_aside(folder),
            )
            moved.append(folder.name)
    if moved and ours:
        refuse()
        for name in _names(before) - {*moved}:
            shutil.rmtree(output_dir / META / "stale" / name, ignore_errors=True)
    if moved or not ours:
        kept = moved if ours else []
        record = encode_record({"run_url": run_url, "moved": kept})
        (output_dir / META / "stale.json").write_bytes(record)


def _record(output_dir: Path) -> dict[str, object]:
    try:
        return decode_record((output_dir / META / "stale.json").read_bytes(), "record 'stale.json'")
    except (OSError, ManifestError):
        return {}


def _names(record: dict[str, object]) -> set[str]:
    """What may be deleted; whatever else the record says is none of ours."""
    moved = record.get("moved")
    names = moved if isinstance(moved, list) else []
    return {name for name in names if isinstance(name, str) and re.fullmatch(r"checkpoint-\d+", name)}
