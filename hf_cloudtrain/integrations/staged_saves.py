"""The staged saves of one training (`staging/`), as Trainer and loop use them: whether there are any, and who waits for them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
from hf_cloudtrain.runtime.text import size_text
from hf_cloudtrain.staging.saves import WORTH_IT, AsyncSaves, why_not

logger = logging.getLogger(__name__)


class StagedSaves:
    """The staged saves of one training whose attempt has begun. Every rank has one; the leader of the disk stages.

    Args:
        size: bytes of a checkpoint, expected.

    Example:
        >>> staged = StagedSaves(checkpointer, checkpoint_size([model]))
        >>> staged.open(Path("out/checkpoint-500"))
        >>> trainer._save_checkpoint(model, trial=None)
        >>> staged.close()
        >>> checkpointer.save(Path("out/checkpoint-500"), position)
    """

    def __init__(self, checkpointer: Checkpointer, size: int) -> None:
        self._checkpointer = checkpointer
        self._size = size
        self._saves: AsyncSaves | None = None
        checkpointer.ranks.each_leader(self._start, "start the process that writes checkpoints")

    def open(self, folder: Path, target: Path | None = None, replaces: Sequence[Path] = ()) -> None:
        """Stage what this thread writes into a folder. Arguments as `AsyncSaves.open`."""
        if self._saves is not None:
            self._saves.open(folder, target, replaces)

    def close(self) -> bool:
        """Write as always from now on; whether files were staged, so that the folder is not whole yet."""
        return self._saves is not None and self._saves.close()

    def tensor_names(self) -> dict[str, set[str]]:
        """See `AsyncSaves.tensor_names`."""
        return {} if self._saves is None else self._saves.tensor_names()

    def forget(self) -> None:
        """As `close`, after an error: what was staged is dropped."""
        if self._saves is not None:
            self._saves.forget()

    def write_rest(self) -> None:
        """After a save: what was staged and did not become a checkpoint is written now."""
        if self._saves is not None:
            self._saves.write_rest()

    def settle(self) -> None:
        """All ranks wait until what was saved is whole."""
        self._checkpointer.ranks.each_leader(self.settle_here, "write its last checkpoint")

    def settle_here(self) -> None:
        """As `settle`, on this rank alone."""
        if self._saves is not None:
            self._saves.settle()

    def end(self) -> None:
        """Stop the writer, once what was saved is whole."""
        saves, self._saves, queue = self._saves, None, self._checkpointer.upload_queue
        if saves is not None:
            saves.end()
            if queue is not None and queue.late is saves:
                queue.late = None

    def _start(self) -> None:
        checkpointer, queue = self._checkpointer, self._checkpointer.upload_queue
        assert queue is not None, "an attempt has begun, and this rank uploads"
        connection = checkpointer.storage.connection
        try:
            self._saves = AsyncSaves(checkpointer.output_dir, expected=self._size, connection=connection)
            logger.info("Saves are asynchronous: process %s writes their files.", self._saves.writer_pid)
        except OSError as error:
            logger.warning("Saves are not asynchronous: %s", error)
        queue.late = self._saves


def may_stage(
    checkpointer: Checkpointer,
    wish: bool | None,
    size: int,
    refusal: Callable[[], str | None] = lambda: None,
) -> bool:
    """Whether the saves of a training are staged. On all ranks; rank 0 decides.

    Args:
        wish: what the user wants; None: where a checkpoint is large enough.
        size: bytes of a checkpoint, expected.
        refusal: why this framework cannot stage them; None if it can.
    """
    wish = env.async_save(wish)

    def why_ordinary() -> str | None:
        if wish is False:
            return "async_save=False"
        if len(checkpointer.ranks.leaders) > 1:
            return "the machines have disks of their own"
        if env.verify_folder() is not None:
            return "verify-resume looks at each checkpoint as soon as it is saved"
        if (reason := refusal()) is not None:
            return reason
        if wish is None and size < WORTH_IT:
            return f"a checkpoint has {size_text(size)} only"
        return why_not(size)

    reason = checkpointer.ranks.agree(why_ordinary, "prepare asynchronous saves")
    if reason is not None and (wish or (wish is None and size >= WORTH_IT)) and checkpointer.ranks.is_main:
        logger.log(logging.WARNING if wish else logging.INFO, "Saves are not asynchronous: %s.", reason)
    return reason is None


def checkpoint_size(models: Sequence[Any], *, save_only_model: bool = False) -> int:
    """Bytes of a checkpoint, expected: the weights, and two numbers of the optimizer for each one that is trained."""
    size = 0
    for model in models:
        size += sum(int(tensor.nbytes) for tensor in (*model.parameters(), *model.buffers()))
        trained = sum(tensor.numel() for tensor in model.parameters() if tensor.requires_grad)
        size += 0 if save_only_model else 8 * int(trained)
    return size
