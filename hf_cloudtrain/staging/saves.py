"""AsyncSaves: which saves of a training are staged, and who waits for their files.

open     before the framework saves: wait for the save before it, then stage what is written into the folder
close    the framework has saved
take     called by the Checkpointer: the folder moves to `_cloudtrain/saving/`, the writer makes it whole
settle   wait until it is whole, as before `load_best_model_at_end` and at the end of training
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.frozen import OutboxEntry, copy_out
from hf_cloudtrain.checkpoints.local_home import SAVING, own_writers, wait_for_writer
from hf_cloudtrain.errors import NotCommittedError
from hf_cloudtrain.runtime.files import temp_suffix
from hf_cloudtrain.runtime.patience import told_if_slow
from hf_cloudtrain.runtime.text import size_text
from hf_cloudtrain.runtime.threads import before_exit
from hf_cloudtrain.staging.job import WriteJob
from hf_cloudtrain.staging.memory import StagingMemory, is_supported, room
from hf_cloudtrain.staging.process import WriterProcess
from hf_cloudtrain.staging.recorders import write_file
from hf_cloudtrain.staging.window import Window
from hf_cloudtrain.storage.folder_files import TEMPORARY
from hf_cloudtrain.storage.names import LOCAL

logger = logging.getLogger(__name__)

WORTH_IT = 64 * 2**20
"""Bytes of a checkpoint from which on staging is the default."""
HEADROOM = 1.25
"""Room in memory over the expected size of a checkpoint."""


class AsyncSaves:
    """The staged saves of one training, on the rank that moves the bytes of its disk.

    Args:
        expected: bytes of a checkpoint.
        connection: URL and options of the run's storage, for the upload if the training is killed.
        in_place: whether the folder is written again and again. Then it keeps its name, and each save gets a copy.

    Raises:
        OSError: no memory, no process, or the writer of a different training works in this folder.
        NotCommittedError: the writer of a killed training takes too long.

    Example:
        >>> saves = AsyncSaves(Path("out"), expected=2**30)
        >>> saves.open(Path("out/checkpoint-500"))
        >>> trainer._save_checkpoint(model, trial=None)
        >>> saves.close()
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        expected: int,
        connection: tuple[str, dict[str, Any]] | None = None,
        in_place: bool = False,
    ) -> None:
        self.output_dir = output_dir
        self.staged = 0
        """How many saves were staged."""
        self._connection = connection if _is_json(connection) else None
        self._in_place = in_place
        if (earlier := own_writers.get(output_dir)) is not None:
            earlier.end()
        wait_for_writer(output_dir)
        self._memory = StagingMemory(max(int(expected * HEADROOM), WORTH_IT))
        self._window: Window | None = None
        self._ended = self._gave_up = False
        try:
            self._process = WriterProcess(output_dir, self._memory)
        except OSError:
            self._memory.close()
            raise
        own_writers[output_dir] = self
        threading.Thread(
            target=self._memory.populate, args=(expected,), name="cloudtrain-populate", daemon=True
        ).start()
        before_exit(self.end)

    @property
    def writer_pid(self) -> int | None:
        """Of the writer process."""
        return self._process.pid

    def open(self, folder: Path, target: Path | None = None, replaces: Sequence[Path] = ()) -> None:
        """Stage, from now on, what this thread writes into a folder; waits until the save before it is whole.

        Args:
            target: the name that the folder gets when it is whole, if it has a different one now.
            replaces: older checkpoints, which are deleted when this one is whole.
        """
        self.settle()
        if not self._ended:
            self._window = Window(str(folder), self._memory, self._is_older, target=str(target or folder))
            self._window.deleted += map(str, replaces)
            self._window.open()

    def close(self) -> bool:
        """Write files as always, from now on; whether some were staged, so that the folder is not whole."""
        if self._window is None:
            return False
        self._window.close()
        return bool(self._window.files)

    def tensor_names(self) -> dict[str, set[str]]:
        """What the staged safetensors files of the save under way hold, by their paths in its folder."""
        files = [] if self._window is None else self._window.files
        return {file.path: {part[0] for part in file.parts} for file in files if file.kind == "safetensors"}

    def forget(self) -> None:
        """Drop what was staged, and write files as always from now on: the save has failed."""
        self.close()
        self._window = None

    def take(
        self,
        folder: Path,
        entry: OutboxEntry,
        since_ns: int,
        submit: Callable[[OutboxEntry], None],
        lose: Callable[[Exception], None],
    ) -> bool:
        """See `LateFiles.take`."""
        self.close()
        window = self._window
        if window is None or window.target != os.path.abspath(folder) or not window.files:
            self.settle() if self._in_place else self.write_rest()  # what is copied now must be whole
            return False
        saving = self.output_dir / LOCAL / SAVING / f"{folder.name}-{temp_suffix()}"

        def done(home: str) -> None:
            if self._in_place:
                shutil.rmtree(saving, ignore_errors=True)
            submit(OutboxEntry.read(Path(home)))

        def failed(reason: str) -> None:
            shutil.rmtree(saving, ignore_errors=True)
            lose(OSError(reason))

        try:
            saving.parent.mkdir(parents=True, exist_ok=True)
            if self._in_place:
                self._copy(window, saving)
            else:
                os.rename(window.folder, saving)
            job = WriteJob(
                output_dir=str(self.output_dir),
                folder=str(saving),
                target=str(folder),
                inode=os.stat(saving).st_ino,
                files=window.files,
                entry=entry.encode().decode(),
                since_ns=since_ns,
                delete=window.deleted,
                in_place=self._in_place,
                connection=self._connection,
            )
            self._process.write(job, done, failed)
        except (OSError, ValueError) as error:
            logger.warning("%s is written at once: %s", folder.name, error)
            if self._in_place:
                shutil.rmtree(saving, ignore_errors=True)
            elif saving.exists():
                os.rename(saving, window.folder)
            self.write_rest()
            return False
        self._window = None
        self.staged += 1
        return True

    def settle(self, timeout: float | None = None) -> None:
        """Wait until the save under way is whole on this disk.

        Raises:
            NotCommittedError: after `timeout` seconds.
            OSError: the disk is full, or refuses.
        """
        self.write_rest()
        if not self._process.is_busy:
            return
        with told_if_slow("write the checkpoint before"):
            self._gave_up = not self._process.wait(timeout)
        if self._gave_up:
            raise NotCommittedError(self._not_whole)

    def end(self) -> None:
        """Wait for the save under way, and end the writer and its memory; never raises, and logs what is left.

        Where an earlier wait was given up, as when a machine is preempted, it does not wait again.
        """
        if self._ended:
            return
        self._ended = True
        try:
            self.settle(0.0 if self._gave_up else env.drain_timeout())
        except (NotCommittedError, OSError) as error:
            logger.error("%s", error)
        except KeyboardInterrupt:
            logger.error("%s", self._not_whole)
        if own_writers.get(self.output_dir) is self:
            del own_writers[self.output_dir]
        self._process.end()
        if not self._process.is_busy:
            self._memory.free()  # a notebook keeps its trainer, and so this object
        self._memory.close()

    @property
    def _not_whole(self) -> str:
        return (
            f"The last checkpoint is in memory and not written to {str(self.output_dir)!r} yet. The writer process goes on "
            f"when this one ends, and uploads it; its messages are in {str(self.output_dir / LOCAL / 'writer.log')!r}. If it "
            f"cannot, `cloudtrain checkpoint flush {self.output_dir}` does."
        )

    def write_rest(self) -> None:
        """Write what was staged and then not saved as a checkpoint: an exception came, or it is of a different folder."""
        window, self._window = self._window, None
        if window is None:
            return
        window.close()
        for file in window.missing():
            write_file(Path(window.folder, file.path), file, self._memory)
        if window.files and window.folder != window.target:
            shutil.rmtree(window.target, ignore_errors=True)
            os.rename(window.folder, window.target)
        for path in window.deleted:
            shutil.rmtree(path, ignore_errors=True)

    def _copy(self, window: Window, saving: Path) -> None:
        """Copy what lies in the folder beside it, because the script may write it again before the writer is done."""
        folder = Path(window.folder)
        for file in window.files:
            if TEMPORARY.fullmatch(os.path.basename(file.path)):  # not part of a checkpoint
                write_file(folder / file.path, file, self._memory)
        window.files = window.missing()
        saving.mkdir()
        copy_out(folder, saving)

    def _is_older(self, path: str) -> bool:
        home, name = os.path.split(path)
        return (
            home == os.path.abspath(self.output_dir) and re.fullmatch(r"checkpoint-\d+.*", name) is not None
        )


def why_not(expected: int) -> str | None:
    """Why saves of this size cannot be staged on this machine; None if they can."""
    if not is_supported():
        return "this system has no anonymous shared memory (memfd)"
    needed, there = int(expected * HEADROOM), room()
    if needed > there:
        return f"staging needs {size_text(needed)} of memory, and {size_text(there)} can be taken"
    return None


def _is_json(value: object) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):  # an object for fsspec, as a session
        return False
    return True
