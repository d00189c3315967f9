"""Marks that the ranks of one machine leave on its disk while `Accelerator.save_state` writes a folder.

    <home>/_cloudtrain/states/<launch>/3     rank 3: how often it has entered save_state, and how often it has left it
    <home>/_cloudtrain/states/writing.json   the folder that rank 0 writes now, or wrote when it was killed

Rank 0 waits for the others, whose random states belong to the checkpoint. A script that calls `save_state` on rank 0 only is known
by the silence of the others at its first save.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from hf_cloudtrain.checkpoints.local_home import make_local_home
from hf_cloudtrain.runtime.files import write_whole
from hf_cloudtrain.runtime.process_tree import is_alive, this_process
from hf_cloudtrain.storage.names import LOCAL

logger = logging.getLogger(__name__)

SILENCE = 30.0
"""Seconds after which ranks that have never entered save_state are taken not to call it: a step keeps ranks together."""
PATIENCE = 600.0
"""Seconds that rank 0 waits for a rank that has entered."""
POLL = 0.02


class Marks:
    """The marks of one process.

    Args:
        home: folder of our own files.
        rank, size: of this process among those of this machine.
    """

    def __init__(self, home: Path, rank: int, size: int) -> None:
        self._states = home / LOCAL / "states"
        # Ranks of one launch have one parent, or are counted on by torchrun: marks of an earlier launch do not count.
        launch = f"{os.getppid()}-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self._here = self._states / launch
        self._rank, self._size = rank, size
        self._entered = self._left = 0
        self._others_save: bool | None = None
        make_local_home(home)

    @contextlib.contextmanager
    def saving(self, folder: Path | None) -> Iterator[None]:
        """Around `save_state`, and on rank 0 around all that makes a checkpoint of its folder; an error leaves the marks.

        Args:
            folder: absolute; None where Accelerate chooses it.
        """
        self._entered += 1
        self._write()
        if self._rank == 0 and folder is not None:
            record = {"folder": str(folder), "process": this_process()}
            write_whole(self._states / "writing.json", json.dumps(record).encode())
        yield
        self._left += 1
        self._write()
        if self._rank == 0:
            (self._states / "writing.json").unlink(missing_ok=True)

    def wait(self) -> None:
        """On rank 0, when it has written its own files: until the others have written theirs."""
        began = time.monotonic()
        others = range(1, self._size)
        while self._others_save is not False and others:
            seen = [self._read(rank) for rank in others]
            if all(left >= self._entered for _, left in seen):
                self._others_save = True
                return
            waited = time.monotonic() - began
            if self._others_save is None and waited > SILENCE and not any(entered for entered, _ in seen):
                self._others_save = False
                logger.info(
                    "Only rank 0 calls save_state(), so random states of other ranks are in no checkpoint."
                )
            elif waited > PATIENCE:
                logger.warning(
                    "A rank has not left save_state() within %.0f s; its files may be missing.", waited
                )
                return
            else:
                time.sleep(POLL)

    def close(self) -> None:
        """At the end of rank 0."""
        shutil.rmtree(self._here, ignore_errors=True)

    def _write(self) -> None:
        self._here.mkdir(parents=True, exist_ok=True)
        if self._size > 1:
            write_whole(self._here / str(self._rank), f"{self._entered} {self._left}".encode())

    def _read(self, rank: int) -> tuple[int, int]:
        try:
            entered, left = (self._here / str(rank)).read_text().split()
        except (OSError, ValueError):
            return 0, 0
        return int(entered), int(left)


def cut_off(home: Path) -> Path | None:
    """The folder that a killed `save_state` has left half-written, once; all marks go."""
    states = home / LOCAL / "states"
    try:
        record = json.loads((states / "writing.json").read_bytes())
        folder, process = Path(record["folder"]), dict(record["process"])
    except (OSError, ValueError, TypeError, KeyError):
        folder, process = None, {}
    if is_alive(process):
        return None  # a different start of the run, which this one overtakes
    shutil.rmtree(states, ignore_errors=True)
    return folder
