"""What a checkpoint holds, whether it can be served, and what is downloaded of it."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.errors import ConfigurationError, CorruptCheckpointError, StorageError
from hf_cloudtrain.serving.models.source import Wish, is_model_folder, model_of_checkpoint, model_of_folder
from hf_cloudtrain.testing import FaultyDisk
from tests.unit.cli.terminal import Run, damage

CONFIG = {"architectures": ["BertForSequenceClassification"]}
MODEL = {
    "config.json": json.dumps(CONFIG).encode(),
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
}
TRAINING = {"optimizer.pt": b"pickle", "rng_state.pth": b"pickle", "training_args.bin": b"pickle"}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("HF_CLOUDTRAIN_CACHE", str(tmp_path / "cache"))
    run = Run(tmp_path / "run", tmp_path / "out")
    run.begin()
    return run


def refusal(run: Run, files: dict[str, bytes], wish: Wish | None = None) -> str:
    """Why a checkpoint with these files, and no others, is not served."""
    run.save(1, 5, files)
    manifest = run.catalog.read(CheckpointKey(1, 5))
    kept = [entry for entry in manifest.files if entry.path in files]
    object.__setattr__(manifest, "files", tuple(kept))
    with pytest.raises(ConfigurationError) as caught:
        model_of_checkpoint(run.catalog, manifest, wish or Wish())
    return str(caught.value)


def test_only_the_files_of_the_model_are_downloaded(run: Run, tmp_path: Path) -> None:
    run.save(1, 5, {**MODEL, **TRAINING, "code/inference.py": b"1/0"})
    model = model_of_checkpoint(run.catalog, run.catalog.read(CheckpointKey(1, 5)), Wish())
    assert {path.name for path in model.folder.iterdir()} == set(MODEL)
    assert model.task is not None
    assert model.task.name == "text-classification"
    assert not list((tmp_path / "cache").rglob("*.p*"))


def test_the_code_of_a_checkpoint_is_downloaded_only_if_it_is_trusted(run: Run) -> None:
    run.save(1, 5, {**MODEL, **TRAINING, "code/inference.py": b"1/0"})
    model = model_of_checkpoint(run.catalog, run.catalog.read(CheckpointKey(1, 5)), Wish(trust_code=True))
    assert (model.folder / "code" / "inference.py").read_bytes() == b"1/0"
    assert (model.runs_code, model.task) == (True, None)


def test_a_second_start_downloads_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.save(1, 5, MODEL)
    manifest = run.catalog.read(CheckpointKey(1, 5))
    first = model_of_checkpoint(run.catalog, manifest, Wish())
    (run.folder / "checkpoint-5" / "model.safetensors").unlink()
    assert model_of_checkpoint(run.catalog, manifest, Wish()) == first


@pytest.mark.parametrize("how", ["before", "during"])
def test_a_full_disk_names_the_variable_that_moves_the_copies(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """A later start downloads the rest."""
    run.save(1, 5, MODEL)
    manifest = run.catalog.read(CheckpointKey(1, 5))
    with monkeypatch.context() as patch, contextlib.ExitStack() as held:
        if how == "before":
            disk = shutil.disk_usage(tmp_path)

            def usage(path: object) -> Any:
                return disk._replace(free=2**20) if "cache" in str(path) else disk

            patch.setattr(shutil, "disk_usage", usage)
        else:
            held.enter_context(FaultyDisk(tmp_path / "cache", at=12))
        with pytest.raises(StorageError, match=r"HF_CLOUDTRAIN_CACHE sets the folder of the copies\.$"):
            model_of_checkpoint(run.catalog, manifest, Wish())
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert model_of_checkpoint(run.catalog, manifest, Wish()).task is not None


def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_named(run: Run) -> None:
    run.save(1, 4, MODEL)
    run.save(1, 5, MODEL)
    damage(run.folder / "checkpoint-5" / "model.safetensors")
    with pytest.raises(
        CorruptCheckpointError,
        match=r"'model.safetensors' of checkpoint-5 differs.*pass -c 000001-0000000004",
    ):
        model_of_checkpoint(run.catalog, run.catalog.read(CheckpointKey(1, 5)), Wish())
    damage(run.folder / "checkpoint-4" / "config.json")
    with pytest.raises(CorruptCheckpointError, match="There is no checkpoint before it"):
        model_of_checkpoint(run.catalog, run.catalog.read(CheckpointKey(1, 4)), Wish())


def test_pickled_weights_are_refused_before_they_are_downloaded(run: Run, tmp_path: Path) -> None:
    files = {**MODEL, "pytorch_model.bin": b"pickle"}
    del files["model.safetensors"]
    text = refusal(run, files)
    assert "its weights in 'pytorch_model.bin', a pickle, which may run code" in text
    assert "save_pretrained" in text
    assert not (tmp_path / "cache" / "models").exists()


@pytest.mark.parametrize("where", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_chat_model_is_answered_with_the_commands_that_serve_it(run: Run, where: str) -> None:
    template = b"{{ x }}" if where.endswith("jinja") else b'{"chat_template": "{{ x }}"}'
    config = b'{"architectures": ["LlamaForCausalLM"]}'
    text = refusal(run, {**MODEL, "config.json": config, where: template})
    fetch = f"cloudtrain checkpoint download {run.url} chat -c 000001-0000000005"
    assert f"`{fetch} && vllm serve chat/checkpoint-5`" in text
    assert f"`{fetch} && transformers serve chat/checkpoint-5`" in text
    assert "\n" not in text


def test_a_missing_tokenizer_or_image_processor_is_named(run: Run, tmp_path: Path) -> None:
    files = {name: data for name, data in MODEL.items() if name != "tokenizer.json"}
    assert "has no tokenizer. Pass --processor with a folder" in refusal(run, files)
    images = {**files, "config.json": b'{"architectures": ["ViTForImageClassification"]}'}
    for name, data in images.items():
        (tmp_path / "vit").mkdir(exist_ok=True)
        (tmp_path / "vit" / name).write_bytes(data)
    with pytest.raises(ConfigurationError, match="has no image processor"):
        model_of_folder(tmp_path / "vit", Wish())
    assert model_of_folder(tmp_path / "vit", Wish(processor="google/vit")).processor == "google/vit"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config.json": None}, "has no config.json, so its architecture is unknown"),
        (
            {"config.json": b"{}"},
            "names no architecture, so the task is unknown. Pass it, such as --task text",
        ),
        ({"config.json": b"["}, "'config.json' of checkpoint-5 of .* is not a JSON object"),
        ({"model.safetensors": None}, "holds no weights"),
        ({"model.safetensors": None, "code/inference.py": b""}, "pass --trust-code to run it"),
        (
            {"model.safetensors": None, "adapter_model.bin": b"", "adapter_config.json": b"{}"},
            "its weights in 'adapter_model.bin', a pickle",
        ),
        (
            {"adapter_model.safetensors": b"", "adapter_config.json": b'{"task_type": "SEQ_CLS"}'},
            "names no base model. Pass it: --base",
        ),
        (
            {
                "model.safetensors.index.json": b'{"weight_map": {"a": "model.safetensors", "b": "pytorch_model.bin"}}'
            },
            "The index of the weights of checkpoint-5 of .* names 'pytorch_model.bin', which is not one",
        ),
        (
            {"other.safetensors.index.json": b'{"weight_map": {"a": "/srv/other/model.safetensors"}}'},
            "names '/srv/other/model.safetensors', which is not one of its safetensors",
        ),
        ({"model.safetensors.index.json": b"{}"}, "names 'None', which is not one"),
        (
            {"adapter_config.json": b'{"base_model_name_or_path": "evil/model"}'},
            "has adapter_config.json and no 'adapter_model.safetensors', so transformers would load the base model that it names",
        ),
    ],
)
def test_what_cannot_be_served_is_refused(run: Run, changes: dict[str, bytes | None], message: str) -> None:
    import re

    files = {name: data for name, data in {**MODEL, **changes}.items() if data is not None}
    assert re.search(message, refusal(run, files))


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"peft_type": "XLORA", "adapters": {"0": "evil/adapter"}}, "is of the type 'XLORA'"),
        ({}, "is of the type 'None'"),
        (
            {"peft_type": "LORA", "megatron_config": {"a": 1}, "megatron_core": "antigravity"},
            "is for Megatron",
        ),
    ],
)
def test_an_adapter_that_loads_more_than_weights_is_refused(
    run: Run, more: dict[str, Any], what: str
) -> None:
    record = {"task_type": "SEQ_CLS", "base_model_name_or_path": "bert", **more}
    adapter = {"adapter_model.safetensors": b"", "adapter_config.json": json.dumps(record).encode()}
    assert f"{what}. Served are LORA, " in refusal(run, {**MODEL, **adapter})


def test_code_that_is_not_there_cannot_be_trusted(run: Run) -> None:
    assert "has no code/inference.py, which --trust-code would run" in refusal(
        run, MODEL, Wish(trust_code=True)
    )


def test_a_folder_with_a_model_is_told_from_a_run(run: Run, tmp_path: Path) -> None:
    run.save(1, 5, MODEL)
    assert not is_model_folder(str(run.folder))
    assert not is_model_folder(run.url)
    assert is_model_folder(str(run.folder / "checkpoint-5"))
