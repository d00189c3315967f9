"""The child process of a run whose real, small disk is full when the writer writes what was staged; `/dev/shm` is small, too."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.small_disk import _call, full, mount_small_disk

SIZE = 24 * 2**20
SHM = Path("/dev/shm")


def main(folder: Path) -> None:
    disk = folder / "disk"
    mount_small_disk(disk, SIZE)
    _call("mount", b"none", os.fsencode(SHM), b"tmpfs", 0, b"size=65536")
    # Only now: they start threads.
    import torch
    from safetensors.torch import save_file

    from hf_cloudtrain.checkpoints.manifest import Position
    from hf_cloudtrain.storage.names import LOCAL
    from tests.faults.staged import StagedMachine

    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    machine = StagedMachine(disk / "out", f"file://{folder / 'run'}")
    machine.start()
    values = {"a": torch.arange(2.0**21)}  # 8 MB

    def save(step: int, write: Callable[[Path], Any]) -> None:
        target = machine.output_dir / f"checkpoint-{step}"
        target.mkdir()
        machine.saves.open(target)
        write(target)
        (target / "config.json").write_text("{}")
        machine.saves.close()
        machine.checkpointer.save(target, Position(global_step=step))
        machine.saves.settle()

    kinds: list[Callable[[Path], Any]] = [
        lambda target: torch.save(values, target / "optimizer.pt"),
        lambda target: save_file(values, target / "model.safetensors"),
    ]
    for step, write in enumerate(kinds, 1):
        with full(disk, left=2**22):
            save(step, write)
        assert os.listdir(machine.output_dir / LOCAL / "saving") == [], "the next save needs the room"
        save(10 * step, write)
        machine.wait()
    print(sorted(path.name for path in machine.output_dir.glob("checkpoint-*")))
    machine.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
