"""Checkpoints of whoever writes one folder again and again, as plain PyTorch scripts do.

The folder itself is the checkpoint. A save copies it, because the next one writes into the same files; a restore puts
verified files back into it, one by one, and leaves everything else that lies there. Its own `.cloudtrain` is no part
of it.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from hf_cloudtrain.checkpoints.attempts import Attempt
from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
from hf_cloudtrain.checkpoints.download import download, put_in_place
from hf_cloudtrain.checkpoints.freeze import own_files
from hf_cloudtrain.checkpoints.manifest import Manifest
from hf_cloudtrain.checkpoints.outbox import OutboxEntry
from hf_cloudtrain.runtime.ranks import Ranks
from hf_cloudtrain.storage.names import META

logger = logging.getLogger(__name__)

SHOWN_FILES = 10
"""Names that a warning lists."""


class InPlaceCheckpointer(Checkpointer):
    """The checkpoints of a run whose `output_dir` is itself the checkpoint. Arguments as `Checkpointer`.

    Its ranks need no process group: they meet over torchrun's store, or in the folder.

    Example:
        >>> checkpointer = InPlaceCheckpointer("s3://bucket/runs/cifar", "ckpt")
        >>> checkpointer.begin(0)
        >>> torch.save(state, "ckpt/checkpoint.pt")
        >>> checkpointer.save(checkpointer.output_dir, Position(global_step=500))
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._copied_ns = 0
        """When the last copy was made, on the clock of the disk."""
        super().__init__(*arguments, **options)

    def local_folder(self, manifest: Manifest) -> Path:
        """Where a checkpoint is on this machine: always the folder itself."""
        return self.output_dir

    def begin(self, global_step: int, *, started_over: bool = False) -> Attempt:
        """See `Checkpointer.begin`. What is in the folder by now was restored, or is the user's own."""
        attempt = super().begin(global_step, started_over=started_over)

        def look_at_the_clock() -> None:
            self._copied_ns = self.mark_save_begin()

        self.ranks.each_leader(look_at_the_clock, f"write to {str(self.output_dir)!r}")
        return attempt

    def _find_ranks(self) -> Ranks:
        self._check_writable()
        return Ranks.current(self.output_dir / META / "ranks")

    def _fetch(
        self, manifest: Manifest, wanted: Callable[[str], bool], on_bytes: Callable[[int], None]
    ) -> None:
        beside = self.output_dir / META / "restored"
        shutil.rmtree(beside, ignore_errors=True)  # of a process that was killed
        download(self.catalog, manifest, beside / "files", wanted=wanted, on_bytes=on_bytes)
        others = put_in_place(beside / "files", self.output_dir, manifest)
        shutil.rmtree(beside, ignore_errors=True)
        if others:
            more = f" and {len(others) - SHOWN_FILES} more" if len(others) > SHOWN_FILES else ""
            logger.warning(
                "%s holds files that are no part of %s. They stay, and will be part of the next upload: %s%s.",
                self.output_dir,
                manifest.folder,
                ", ".join(others[:SHOWN_FILES]),
                more,
            )

    def _move_stale(self, global_step: int) -> None:
        """Nothing: every folder in it is the user's."""

    def _hand_over(self, folder: Path, entry: OutboxEntry, since_ns: int) -> None:
        # The files that a disk wrote last, and the first one those of nobody, too.
        share = self._share(
            entry, lambda: (list(own_files(folder)), list(own_files(folder, self._copied_ns)))
        )

        def copy() -> None:
            if share is not None:
                self._keep(entry, share, partial(self.outbox.accept, folder, link=False))
            self._check_writable()  # makes our folder anew, where the user has removed everything
            self._copied_ns = self.mark_save_begin()

        # After this the folder may be written again, so every rank waits for the copy.
        self.ranks.each_leader(copy, "copy the checkpoint")
