"""What `cloudtrain launch` does before the command starts: the run is reached, and its newest state is where a script looks for it.

A Trainer restores by itself, in `train()`. But a script with `Accelerator.save_state` chooses the folder to load before it calls
anything that is hooked. So the newest one is restored now, and what a killed start has left half-written moves away. The same holds
for scripts with `hf_cloudtrain.init`, as PeriFlow's users have them: their launcher restores the checkpoint folder.
"""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
from hf_cloudtrain.checkpoints.flush import finish_left_overs
from hf_cloudtrain.checkpoints.in_place import BY_FRAMEWORK, InPlace
from hf_cloudtrain.checkpoints.local_home import remove_if_unused
from hf_cloudtrain.checkpoints.manifest import CheckpointKey, Manifest
from hf_cloudtrain.checkpoints.outbox import Outbox
from hf_cloudtrain.errors import CorruptCheckpointError, StorageError
from hf_cloudtrain.launch.marks import cut_off
from hf_cloudtrain.launch.state_folders import FOLDER, home_of, move_aside, path_of, put
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.storage.names import LOCAL
from hf_cloudtrain.storage.urls import is_local


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What was restored before the command."""

    folder: str | None = None
    """The newest state of Accelerator, as the script names it."""
    variables: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Variables of the command that say which checkpoint is in its checkpoint folder."""


def newest_attempt(run_url: str) -> int:
    """The number of the newest attempt of a run; 0 without one, or where the storage does not answer."""
    try:
        return max(Catalog(Storage(run_url, env.storage_options(None))).attempts.numbers(), default=0)
    except StorageError:
        return 0


def prepare(run_url: str, command: Sequence[str], say: Callable[[str], None]) -> Prepared:
    """Reach the run, tidy this machine, and restore the newest checkpoint, unless Trainer will do that.

    Raises:
        StorageError: the storage does not answer, or refuses.
        CorruptCheckpointError: all states are damaged.
    """
    catalog = Catalog(Storage(run_url, env.storage_options(None)))
    home = home_here(catalog)
    if home is not None:
        _tidy(catalog, home, say)
    problems = []
    keys = catalog.known_checkpoints()
    if not keys and not is_local(catalog.storage.url):
        # A bucket that does not exist looks like a new run, and the command may import for half a minute before it saves.
        catalog.storage.check()
    for key in reversed(keys):
        manifest = catalog.read(key)
        if FOLDER not in manifest.origin:
            return _in_checkpoint_folder(run_url, manifest)
        name = manifest.origin[FOLDER]
        folder = path_of(manifest, command)
        if folder is None:
            say(
                f"{manifest.folder} was saved to {name!r}, which the command does not name, so it is not restored yet."
            )
            return Prepared()
        try:
            if put(catalog, manifest, folder, home or home_of(folder)):
                say(f"Restored {name} from {manifest.folder} of {catalog.storage.url!r}.")
            return Prepared(name)
        except CorruptCheckpointError as error:
            problems.append(str(error))
            say(f"{manifest.folder} is damaged; trying the one before. {error}")
    if problems:
        raise CorruptCheckpointError(f"All states of {catalog.storage.url!r} are damaged.")
    return Prepared()


def _in_checkpoint_folder(run_url: str, newest: Manifest) -> Prepared:
    """Restore a checkpoint of `hf_cloudtrain.init` into the folder that the environment names, if it names one."""
    folder = env.checkpoint_dir(None) or env.periflow_checkpoint_dir()
    one_of_many = (
        int(os.environ.get("WORLD_SIZE") or 1) > 1
    )  # such as a task of srun: the script restores, if it does
    if folder is None or one_of_many or BY_FRAMEWORK & {file.path for file in newest.files}:
        return Prepared()
    checkpointer = Checkpointer(run_url, folder, layout=InPlace)
    try:
        restored = checkpointer.restore()
    finally:
        checkpointer.close()
    if restored is None:
        return Prepared()
    key = CheckpointKey(restored.manifest.attempt, restored.manifest.step)
    named = {env.RESTORED_CHECKPOINT: str(key), env.PERIFLOW_CHECKPOINT_DIR: os.path.abspath(folder)}
    return Prepared(variables=named)


def home_here(catalog: Catalog) -> Path | None:
    """The output folder of the newest attempt, if that ran on this machine and left something there."""
    numbers = catalog.attempts.numbers()
    if not numbers:
        return None
    facts = catalog.attempts.read(numbers[-1]).facts
    folder = facts.get("output_dir", "")
    is_here = facts.get("host") == platform.node() and os.path.isdir(os.path.join(folder, LOCAL))
    return Path(folder) if os.path.isabs(folder) and is_here else None


def _tidy(catalog: Catalog, home: Path, say: Callable[[str], None]) -> None:
    finish_left_overs(catalog, Outbox(home), bar=True)
    folder = cut_off(home)
    stale = None if folder is None else move_aside(folder, home)
    if stale is not None:
        say(f"{str(folder)!r} was not written to its end; moved to {str(stale)!r}.")
    if not catalog.checkpoints():
        remove_if_unused(home)  # scripts refuse an output folder that is not empty
