"""The newest checkpoint of the run, in the job's checkpoint folder before its command starts."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
from hf_cloudtrain.checkpoints.in_place import BY_FRAMEWORK, InPlace
from hf_cloudtrain.checkpoints.local_folders import LocalFolders
from hf_cloudtrain.checkpoints.local_home import remove_if_unused
from hf_cloudtrain.checkpoints.manifest import CheckpointKey, Manifest
from hf_cloudtrain.launch.state_folders import FOLDER, StateFolders
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.storage.folder_files import own_files
from hf_cloudtrain.storage.names import LOCAL, META, clean_path

logger = logging.getLogger(__name__)


def restore(
    run_url: str, folder: Path, choice: Path, start_over: Callable[[], None] = lambda: None
) -> CheckpointKey | None:
    """Restore the newest checkpoint of a run into a folder; None where the run has none.

    A checkpoint of `Trainer`, `TrainLoop` or `Accelerator.save_state` becomes a folder below it; any other checkpoint
    becomes the folder itself.
    On the first start of a run the folder is empty: scripts refuse an output folder that is not.

    Args:
        choice: file in which the first node on this disk records its choice; the other nodes restore the same one.
        start_over: called by the first node if the run has no checkpoint.
    """
    catalog = Catalog(Storage(run_url, env.storage_options(None)))
    folder.mkdir(parents=True, exist_ok=True)
    if choice.exists():
        chosen = json.loads(choice.read_text())
        if chosen is None:
            return None
        key = CheckpointKey(*chosen)
        checkpointer = Checkpointer(run_url, folder, layout=_layout(catalog, key))
        checkpointer.restorer.fetcher(catalog.read(key))()
        return key
    newest = catalog.newest()
    if newest is None and not any((folder / name).exists() for name in (LOCAL, META)):
        catalog.storage.check()
        start_over()
        return _chosen(None, choice)
    layout = LocalFolders if newest is None else _layout(catalog, newest)
    checkpointer = Checkpointer(run_url, folder, layout=layout)
    try:
        restored = checkpointer.restore()
    finally:
        checkpointer.close()
    if restored is None:
        remove_if_unused(folder)
        start_over()
    return _chosen(
        None if restored is None else CheckpointKey(restored.manifest.attempt, restored.manifest.step), choice
    )


def move_newer(folder: Path, aside: Path, since_ns: int) -> None:
    """Move what was written into a folder since a moment (ns) to another folder, where it replaces what is there."""
    names = dict.fromkeys(path.partition("/")[0] for path in own_files(folder, since_ns))
    if not names:
        return
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for name in names:
        shutil.move(folder / name, aside / name)
    logger.warning(
        "An earlier start ended before its first checkpoint, so training begins at step 0. What it had written moves to %r: %s.",
        str(aside),
        ", ".join(names),
    )


def _chosen(key: CheckpointKey | None, choice: Path) -> CheckpointKey | None:
    choice.parent.mkdir(parents=True, exist_ok=True)
    choice.write_text(json.dumps(key and [key.attempt, key.step]))
    return key


def _layout(catalog: Catalog, key: CheckpointKey) -> type[LocalFolders]:
    manifest = catalog.read(key)
    if FOLDER in manifest.origin:
        return _StateFolders
    by_framework = BY_FRAMEWORK & {file.path for file in manifest.files}
    return LocalFolders if by_framework else InPlace


class _StateFolders(StateFolders):
    """States of Accelerator, below the job's checkpoint folder."""

    def folder(self, manifest: Manifest) -> Path:
        return self.output_dir / Path(clean_path(Path(manifest.origin[FOLDER]).name))
