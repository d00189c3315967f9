"""The layout of plain PyTorch scripts: `output_dir` itself is the checkpoint, and each save writes into the same files.

A save copies the folder, because the next one writes into it again; a restore puts verified files back, one by one, and
leaves other files alone. The folder's `_cloudtrain` is not part of the checkpoint. The ranks need no process group: they
meet over torchrun's store, or in the folder.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.download import download, is_whole, put_in_place
from hf_cloudtrain.checkpoints.frozen import Wanted
from hf_cloudtrain.checkpoints.local_folders import LocalFolders
from hf_cloudtrain.checkpoints.local_home import wait_for_writer
from hf_cloudtrain.checkpoints.manifest import Manifest
from hf_cloudtrain.runtime.ranks import Ranks
from hf_cloudtrain.storage.folder_files import own_files
from hf_cloudtrain.storage.names import LOCAL

logger = logging.getLogger(__name__)

BY_FRAMEWORK = {"trainer_state.json", "training_state.json"}
"""Files in a checkpoint of `Trainer` or `TrainLoop`, which has a folder of its own; any other checkpoint is in place."""
SHOWN_FILES = 10
"""Names that a warning lists."""


class InPlace(LocalFolders):
    """One folder for all checkpoints.

    Example:
        >>> checkpointer = Checkpointer("s3://bucket/runs/cifar", "ckpt", layout=InPlace)
        >>> checkpointer.begin(0)
        >>> torch.save(state, "ckpt/checkpoint.pt")
        >>> checkpointer.save(checkpointer.output_dir, Position(global_step=500))
    """

    links = False
    step_in_names = False

    def __init__(self, output_dir: Path) -> None:
        super().__init__(output_dir)
        self._copied_ns = 0
        """When the last copy was made, by the clock of the disk."""

    def find_ranks(self) -> Ranks:
        """The processes of this job; they may have no process group."""
        self.check_writable()
        return Ranks.current(self.output_dir / LOCAL / "ranks")

    def begin(self, run_url: str, global_step: int, check_owner: Callable[[], None]) -> None:
        """Note the time: what is in the folder now was restored, or is the user's. Nothing moves away."""
        wait_for_writer(self.output_dir)
        self._copied_ns = self.mark_save_begin()

    def folder(self, manifest: Manifest) -> Path:
        """Always `output_dir`."""
        return self.output_dir

    def has(self, manifest: Manifest, wanted: Wanted) -> bool:
        """Whether the folder holds the files of a checkpoint."""
        return is_whole(self.output_dir, manifest, wanted=wanted)

    def fetch(
        self, catalog: Catalog, manifest: Manifest, wanted: Wanted, on_bytes: Callable[[int], None]
    ) -> None:
        """Download a checkpoint beside the folder's files, then move each file to its place."""
        beside = self.output_dir / LOCAL / "restored"
        shutil.rmtree(beside, ignore_errors=True)  # of a process that was killed
        download(catalog, manifest, beside / "files", wanted=wanted, on_bytes=on_bytes)
        others = put_in_place(beside / "files", self.output_dir, manifest)
        shutil.rmtree(beside, ignore_errors=True)
        if others:
            more = f" and {len(others) - SHOWN_FILES} more" if len(others) > SHOWN_FILES else ""
            logger.warning(
                "%s holds files that are not part of %s. They stay, and the next upload will contain them: %s%s.",
                self.output_dir,
                manifest.folder,
                ", ".join(others[:SHOWN_FILES]),
                more,
            )

    def written(self, folder: Path, since_ns: int) -> tuple[list[str], list[str]]:
        """Names of the folder's files, and of those that were written since the last copy."""
        return list(own_files(folder, 0, {})), list(own_files(folder, self._copied_ns, {}))

    def copied_by(self, copy: Callable[[], None]) -> None:
        """Call `copy`, which copies a save, and note when: only later files count as written by the next save."""
        copy()
        self.check_writable()  # creates our folder again if the user has deleted everything
        self._copied_ns = self.mark_save_begin()
