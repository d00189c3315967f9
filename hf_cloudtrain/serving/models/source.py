"""Where a model comes from: a committed checkpoint, downloaded and verified, or a folder of this machine.

    manifest -> the small files -> what it holds, and whether it can be served -> the rest -> a verified, read-only folder

Nothing is loaded here. All of it is untrusted: weights are read from safetensors only, and no file that could run code is even
downloaded, unless the user trusts the code of the checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.download import download
from hf_cloudtrain.checkpoints.manifest import CheckpointKey, Manifest, parse_folder_key
from hf_cloudtrain.datasets.cache import LocalCopy
from hf_cloudtrain.datasets.upload import store_token
from hf_cloudtrain.errors import ConfigurationError, CorruptCheckpointError, ManifestError
from hf_cloudtrain.runtime.files import write_whole
from hf_cloudtrain.serving.models.tasks import Task, adapter_task, task_named, task_of
from hf_cloudtrain.serving.models.untrusted import INDEX, WEIGHTS, check_adapter, check_index
from hf_cloudtrain.storage.folder_files import fresh_files
from hf_cloudtrain.storage.names import META

USER_CODE = "code/inference.py"
ADAPTER = "adapter_config.json"
MANIFEST = "manifest.json"
"""The manifest beside a copy."""
READ = (WEIGHTS, ".json", ".jinja", ".txt", ".model", ".spm", ".tiktoken")
"""Endings of the files that a model and its tokenizer are read from. No pickle is one of them."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SMALL = 4 * 2**20
"""Bytes of a configuration, at most."""
LARGEST_INDEX = 64 * 2**20
"""Bytes of an index of shards, at most; it has a line for each weight."""
PROCESSORS = {
    "tokenizer": ("tokenizer.json", "vocab.txt", "vocab.json", ".model", ".spm", ".tiktoken"),
    "image processor": ("preprocessor_config.json", "image_processor_config.json", "processor_config.json"),
}
"""What a processor is called, and how the names of its files end; one of them is enough."""


@dataclass(frozen=True)
class Model:
    """A model on this machine, and what is known of it before it is loaded."""

    folder: Path
    title: str
    """What it is, for messages: `checkpoint-500 of 's3://bucket/runs/mrpc'`."""
    task: Task | None
    """None if the code of the checkpoint decides."""
    base: str | None = None
    """The base model of an adapter: a folder, or a name on the Hub."""
    processor: str | None = None
    """Where the tokenizer or image processor is read from."""
    runs_code: bool = False
    run: str = ""
    """The URL of its run, or its folder: with `checkpoint`, what `cloudtrain serve` is given for the same model."""
    checkpoint: str | None = None
    """Its key in the run."""


@dataclass(frozen=True)
class Wish:
    """What the user says about a model."""

    trust_code: bool = False
    processor: str | None = None
    base: str | None = None
    task: str | None = None


def model_of_checkpoint(
    catalog: Catalog,
    manifest: Manifest,
    wish: Wish,
    *,
    on_bytes: Callable[[int], None] | None = None,
) -> Model:
    """The model of a checkpoint, whose files all processes of this machine share; without the run, once they are here.

    Raises:
        ConfigurationError: it cannot be served; the message says what to do.
        CorruptCheckpointError: a file differs from the manifest; the message names the checkpoint before.
    """
    url, key = catalog.storage.url, manifest.key
    names = [entry.path for entry in manifest.files]
    fetch = f"cloudtrain checkpoint download {url} chat -c {key} && "

    def look(folder: Path) -> Model:
        title = f"{manifest.folder} of {url!r}"
        return _look(folder, names, title, wish, fetch=fetch, local=f"chat/{_local_name(manifest)}")

    files = [entry for entry in manifest.files if wish.trust_code or entry.path.endswith(READ)]
    home = _copies(catalog) / f"{key}-{manifest.nonce[:8]}-{_kind(wish)}"
    copy = LocalCopy(catalog, dataclasses.replace(manifest, files=tuple(files)), manifest.folder, home)
    try:
        if not copy.is_untouched():
            with tempfile.TemporaryDirectory(prefix="cloudtrain-look-") as work:
                small = [
                    entry
                    for entry in manifest.files
                    if (entry.path.endswith((".json", ".jinja")) and entry.size <= SMALL)
                    or (entry.path.endswith(INDEX) and entry.size <= LARGEST_INDEX)
                ]
                download(catalog, dataclasses.replace(manifest, files=tuple(small)), Path(work, "look"))
                look(Path(work, "look"))
        folder = copy.ensure(on_bytes)
        if not (home / MANIFEST).exists():
            with contextlib.suppress(OSError):  # it belongs to a different user
                write_whole(home / MANIFEST, manifest.encode())
    except CorruptCheckpointError as error:
        raise CorruptCheckpointError(f"{error} {before(catalog, CheckpointKey.named(key))}") from None
    return dataclasses.replace(look(folder), run=url, checkpoint=key)


def manifest_of_copy(catalog: Catalog, key: str, wish: Wish) -> Manifest | None:
    """The manifest of a checkpoint whose files are on this machine, although the run may be deleted.

    Args:
        key: of the checkpoint; None is found for any other name.
        wish: with the code of the checkpoint trusted, it is a different copy.
    """
    found = []
    if CheckpointKey.named(key) or parse_folder_key(key):
        for path in _copies(catalog).glob(f"{glob.escape(key)}-*-{_kind(wish)}/{MANIFEST}"):
            with contextlib.suppress(OSError, ManifestError):
                found.append((path.stat().st_mtime, Manifest.parse(path.read_bytes(), key)))
    return max(found, key=lambda one: one[0], default=(0.0, None))[1]


def _kind(wish: Wish) -> str:
    return "whole" if wish.trust_code else "model"


def _copies(catalog: Catalog) -> Path:
    return Path(env.cache(None), "models", store_token(catalog))


def model_of_folder(folder: Path, wish: Wish) -> Model:
    """The model in a folder of this machine, such as the `best/` of a training.

    Raises:
        ConfigurationError: it cannot be served; the message says what to do.
    """
    title = repr(str(folder))
    found = _look(folder, list(fresh_files(folder, 0)), title, wish, fetch="", local=str(folder))
    return dataclasses.replace(found, run=str(folder.absolute()))


def is_model_folder(path: str) -> bool:
    """Whether a path is a folder with a model, and not a run."""
    folder = Path(path)
    holds = any((folder / name).is_file() for name in ("config.json", ADAPTER, USER_CODE))
    return "://" not in path and holds and not (folder / META).is_dir()


def _look(folder: Path, names: list[str], title: str, wish: Wish, *, fetch: str, local: str) -> Model:
    """What a folder holds, by the names of its files and its configuration."""
    if wish.trust_code:
        if USER_CODE not in names:
            raise ConfigurationError(
                f"{title} has no {USER_CODE}, which --trust-code would run. Leave out --trust-code."
            )
        return Model(folder, title, None, runs_code=True)
    _check_weights(names, title)
    for name in names:
        if name.endswith(INDEX) and "/" not in name:
            check_index(_record(folder / name, title), set(names), title)
    if ADAPTER in names:
        return _adapter(folder, names, title, wish)
    task = task_named(wish.task) if wish.task else task_of(_architecture(folder, title), title)
    if task.name == "text-generation" and _is_chat(folder, names):
        raise ConfigurationError(
            f"{title} is a chat model, which other servers serve better: `{fetch}vllm serve {local}`, or `{fetch}transformers "
            f"serve {local}`."
        )
    if wish.processor is None and not _has_processor(names, task):
        raise ConfigurationError(
            f"{title} has no {_processor(task)}. Pass --processor with a folder or a name on the Hub that has it. A later "
            "training saves it with the model: pass processing_class to Trainer or TrainLoop."
        )
    return Model(folder, title, task, processor=wish.processor)


def _check_weights(names: Iterable[str], title: str) -> None:
    names = [name for name in names if "/" not in name or name == USER_CODE]
    if any(name.endswith(WEIGHTS) for name in names):
        return
    pickles = [name for name in names if name.endswith(PICKLES) and "model" in name]
    if pickles:
        raise ConfigurationError(
            f"{title} has its weights in {pickles[0]!r}, a pickle, which may run code when it is loaded. Only safetensors are "
            "served. If you trust the file, load the model with from_pretrained, write it with save_pretrained, and serve "
            "that folder."
        )
    hint = f" It has {USER_CODE}: pass --trust-code to run it." if USER_CODE in names else ""
    raise ConfigurationError(
        f"{title} holds no weights ('model.safetensors' or 'adapter_model.safetensors').{hint} Choose a checkpoint that a "
        "Trainer, a TrainLoop or save_pretrained has written."
    )


def _adapter(folder: Path, names: list[str], title: str, wish: Wish) -> Model:
    if "adapter_model.safetensors" not in names:
        raise ConfigurationError(
            f"{title} has {ADAPTER} and no 'adapter_model.safetensors', so transformers would load the base model that it names, "
            f"not this one. Remove {ADAPTER} from the folder."
        )
    record = _record(folder / ADAPTER, title)
    task = task_named(wish.task) if wish.task else adapter_task(record.get("task_type"), title)
    base = wish.base or record.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ConfigurationError(
            f"The adapter of {title} names no base model. Pass it: --base FOLDER_OR_NAME"
        )
    check_adapter(record, title)
    processor = wish.processor or (None if _has_processor(names, task) else base)
    return Model(folder, title, task, base, processor)


def _architecture(folder: Path, title: str) -> str:
    if not (folder / "config.json").is_file():
        raise ConfigurationError(
            f"{title} has no config.json, so its architecture is unknown. Save the model with save_pretrained; Trainer and "
            "TrainLoop do so for models of transformers."
        )
    names = _record(folder / "config.json", title).get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise ConfigurationError(
            f"The config.json of {title} names no architecture, so the task is unknown. Pass it, such as --task text-classification."
        )
    return names[0][:100]


def _is_chat(folder: Path, names: Iterable[str]) -> bool:
    settings = folder / "tokenizer_config.json"
    return "chat_template.jinja" in names or (
        settings.is_file() and bool(_record(settings, "the tokenizer").get("chat_template"))
    )


def _processor(task: Task) -> str:
    return "image processor" if task.reads_images else "tokenizer"


def _has_processor(names: Iterable[str], task: Task) -> bool:
    return any(name.endswith(PROCESSORS[_processor(task)]) for name in names if "/" not in name)


def _record(path: Path, title: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ConfigurationError(
            f"{path.name!r} of {title} is not a JSON object. Choose a different checkpoint."
        )
    return found


def _local_name(manifest: Manifest) -> str:
    """As `cloudtrain checkpoint download` calls the folder."""
    is_checkpoint = CheckpointKey.named(manifest.key) is not None
    return f"checkpoint-{manifest.step}" if is_checkpoint else manifest.key.rpartition("-")[0]


def before(catalog: Catalog, key: CheckpointKey | None) -> str:
    """What to serve in place of a damaged checkpoint, or of a damaged folder that was saved by name: its key is None."""
    older = [other for other in catalog.checkpoints() if key is None or other < key]
    if not older:
        return "There is no checkpoint before it." if key else "The run has no checkpoint."
    which = "the one before" if key else "the newest checkpoint"
    return f"Nothing is served in its place. To serve {which}, pass -c {older[-1]}."
