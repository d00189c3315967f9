"""`async_writes`: staged saves (`staging/`) of a folder that the script writes again and again.

async_writes       the first one is an ordinary save, which shows how large a save is; later ones are staged
upload_checkpoint  hands the staged files over; the writer makes them beside the folder, puts them into the outbox, and copies
                   them to where the script has saved them, unless the script has written them again
start_step         files that were not handed over by then are written at once
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
from hf_cloudtrain.checkpoints.frozen import OutboxEntry
from hf_cloudtrain.runtime.text import size_text
from hf_cloudtrain.staging.memory import StagingMemory, is_supported
from hf_cloudtrain.staging.saves import WORTH_IT, AsyncSaves, why_not
from hf_cloudtrain.staging.window import Window

logger = logging.getLogger(__name__)


class AsyncWrites:
    """The staged saves of a checkpoint folder, on the rank that moves its bytes. `UploadQueue.late` for the function API.

    Args:
        wish: what the user wants; None: where a save is large enough.

    Example:
        >>> writes = AsyncWrites(checkpointer, None)
        >>> with writes.window():
        ...     torch.save(state, "ckpt/checkpoint.pt")
        >>> checkpointer.save(checkpointer.output_dir, position)
    """

    def __init__(self, checkpointer: Checkpointer, wish: bool | None) -> None:
        self._checkpointer = checkpointer
        self._folder = checkpointer.output_dir
        self._wish = env.async_save(wish)
        self._size: int | None = None
        """Bytes of the first save, once it is made."""
        self._is_on = self._wish is not False
        self._saves: AsyncSaves | None = None
        if self._is_on and len(checkpointer.ranks.leaders) > 1:
            self._refuse("the machines have disks of their own")
        elif self._is_on and env.verify_folder() is not None:
            self._refuse("verify-resume looks at each checkpoint as soon as it is saved")
        elif self._is_on and not is_supported():
            self._refuse("this system has no anonymous shared memory (memfd)")

    @contextmanager
    def window(self, *, last: bool = False) -> Iterator[None]:
        """Stage what this thread saves in the block.

        Args:
            last: whether the process ends after it, so that the files must be there.
        """
        if not self._is_on or last:
            self.settle()
            yield
        elif self._saves is None:
            with Rehearsal(self._folder) as rehearsal:
                yield
            self._judge(rehearsal)
        else:
            self._saves.open(self._folder)
            try:
                yield
            finally:
                self._saves.close()

    def write_rest(self) -> None:
        """Write, now, what was staged and not handed over."""
        if self._saves is not None:
            self._saves.write_rest()

    def take(
        self,
        folder: Path,
        entry: OutboxEntry,
        since_ns: int,
        submit: Callable[[OutboxEntry], None],
        lose: Callable[[Exception], None],
    ) -> bool:
        """See `LateFiles.take`."""
        if self._saves is not None:
            return self._saves.take(folder, entry, since_ns, submit, lose)
        if self._is_on and self._size is not None:
            self._start(self._size)
        return False

    def settle(self, timeout: float | None = None) -> None:
        """See `LateFiles.settle`."""
        if self._saves is not None:
            self._saves.settle(timeout)

    def end(self) -> None:
        """See `LateFiles.end`."""
        self._is_on = False
        if self._saves is not None:
            self._saves.end()

    def _judge(self, rehearsal: Rehearsal) -> None:
        """After an ordinary save: whether the next one can be staged."""
        if rehearsal.moved:
            self._refuse(
                f"{rehearsal.moved[0]!r} was renamed or removed inside async_writes, where a staged file is not on the disk yet"
            )
        elif self._wish is None and rehearsal.size < WORTH_IT:
            self._refuse(f"a checkpoint has {size_text(rehearsal.size)} only")
        elif (reason := why_not(rehearsal.size)) is not None:
            self._refuse(reason)
        else:
            self._size = rehearsal.size

    def _start(self, size: int) -> None:
        connection = self._checkpointer.storage.connection
        try:
            self._saves = AsyncSaves(self._folder, expected=size, connection=connection, in_place=True)
            logger.info("Saves are asynchronous: process %s writes their files.", self._saves.writer_pid)
        except OSError as error:
            self._refuse(str(error))

    def _refuse(self, reason: str) -> None:
        self._is_on = False
        level = logging.WARNING if self._wish else logging.INFO
        logger.log(level, "Saves are not asynchronous: %s.", reason)


class Rehearsal(Window):
    """A window in which files are written as always, and that notes what a staged save would keep in memory."""

    def __init__(self, folder: Path) -> None:
        self._unused = StagingMemory(0)
        super().__init__(str(folder), self._unused)
        self.moved: list[str] = []
        """Files that are not where they were saved, at the end."""
        self.size = 0
        """Bytes of the others."""
        self._names: set[str] = set()

    def __enter__(self) -> Rehearsal:  # noqa: PYI034 - typing.Self needs Python 3.11
        self.open()
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()
        self._unused.close()
        for name in sorted(self._names):
            try:
                self.size += os.stat(os.path.join(self.folder, name)).st_size
            except OSError:
                self.moved.append(name)

    def open_archive(self, file: Any, relative: str, original: Callable[[Any], Any]) -> Any:
        """For `torch.save`."""
        self._names.add(relative)
        return original(file)

    def serialize(self, specs: Any, relative: str, metadata: Any, options: dict[str, Any]) -> bool:
        """For `safetensors.torch.save_file`."""
        self._names.add(relative)
        return False
