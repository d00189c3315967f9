"""What must hold after a run was interrupted, whatever the cause."""

from __future__ import annotations

import os
from pathlib import Path

from hf_cloudtrain.storage.names import LOCAL
from tests.faults.runs import Machines, bytes_of, contents, left_overs

SALTS = ("", "first", "second")


def first_broken_promise(machines: Machines, accepted: int) -> str:
    """Start again on both disks and continue to step 20; return the first broken promise as text, or an empty string.

    Args:
        accepted: the last step that the machine "out" has accepted; 0 if there is none.
    """
    out, elsewhere = machines.new("out"), machines.new("elsewhere")
    for machine in (out, elsewhere):
        make_leftovers_old(machine.output_dir)
    resumed_at = out.start()
    if resumed_at < accepted:
        return f"step {accepted} was accepted, but the next start resumed after step {resumed_at}"
    if resumed_at and not is_whole_checkpoint(out.output_dir / f"checkpoint-{resumed_at}"):
        return f"the files restored for step {resumed_at} differ from those saved"
    if elsewhere.start() != resumed_at:
        return "two machines resumed at different steps"
    elsewhere.save(20)
    elsewhere.wait()
    if machines.committed()[-1][1] != 20 or machines.restored("third") != bytes_of(20):
        return f"step 20 was not committed: {machines.committed()}"
    if rest := [*left_overs(out.output_dir), *left_overs(elsewhere.output_dir)]:
        return f"unfinished work was not removed: {rest}"
    return ""


def make_leftovers_old(output_dir: Path) -> None:
    """Set the times of unfinished folders back: a start removes only those too old to belong to a running save."""
    for name in left_overs(output_dir):
        os.utime(output_dir / LOCAL / name, (1.0, 1.0))


def is_whole_checkpoint(folder: Path) -> bool:
    """Whether the folder is a complete checkpoint as saved; if a step was saved twice, either save counts."""
    step = int(folder.name.rpartition("-")[2])
    return contents(folder) in [bytes_of(step, salt) for salt in SALTS]
