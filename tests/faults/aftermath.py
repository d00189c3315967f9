"""What must hold after a run was broken off, whatever broke it."""

from __future__ import annotations

import os
from pathlib import Path

from hf_cloudtrain.storage.names import META
from tests.faults.runs import Machines, bytes_of, contents, left_overs

SALTS = ("", "first", "second")


def what_goes_wrong_next(machines: Machines, accepted: int) -> str:
    """Start again on both disks and go on to step 20; the first promise that is broken, in words.

    Args:
        accepted: the last step that the machine "out" has accepted; 0 for none.
    """
    out, elsewhere = machines.new("out"), machines.new("elsewhere")
    for machine in (out, elsewhere):
        let_hours_pass(machine.output_dir)
    began = out.start()
    if began < accepted:
        return f"step {accepted} was accepted, and the next start began after {began}"
    if began and not is_one(out.output_dir / f"checkpoint-{began}"):
        return f"restored other bytes for step {began}"
    if elsewhere.start() != began:
        return "two machines begin at two places"
    elsewhere.save(20)
    elsewhere.wait()
    if machines.committed()[-1][1] != 20 or machines.restored("third") != bytes_of(20):
        return f"step 20 was not committed: {machines.committed()}"
    if rest := [*left_overs(out.output_dir), *left_overs(elsewhere.output_dir)]:
        return f"what was left half-made is never removed: {rest}"
    return ""


def let_hours_pass(output_dir: Path) -> None:
    """What is half-made is swept when it is too old to be a save under way."""
    for left in left_overs(output_dir):
        os.utime(output_dir / META / left, (1.0, 1.0))


def is_one(folder: Path) -> bool:
    """Whether it is a whole checkpoint that was saved; either of two saves of a step may be the one."""
    step = int(folder.name.rpartition("-")[2])
    return contents(folder) in [bytes_of(step, salt) for salt in SALTS]
