"""The plug-in of axolotl, which is not installed here: its base class is an empty one. `tests/trainers` has the real one."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from transformers import Trainer, TrainingArguments

from hf_cloudtrain import CloudTrainCallback
from hf_cloudtrain.checkpoints import upload_queue
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.env import RUN_URL
from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.storage.client import Storage
from tests.unit.integrations.trainer.test_exactness import Data, Model

NAME = "hf_cloudtrain.integrations.axolotl"


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["axolotl.integrations.base"].BasePlugin = type("BasePlugin", (), {})  # type: ignore[attr-defined]
    yield importlib.import_module(NAME).CloudTrainPlugin()
    del sys.modules[NAME]


def train(plugin: Any, folder: Path, machine: str, steps: int = 2, **config: Any) -> Any:
    """As axolotl does it; returns its configuration at the end."""
    cfg = SimpleNamespace(
        **{
            "cloudtrain_run_url": str(folder / "run"),
            "resume_from_checkpoint": None,
            "save_total_limit": None,
            **config,
        }
    )
    args = TrainingArguments(
        str(folder / machine),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_steps=2,
        max_steps=steps,
    )
    callbacks = plugin.add_callbacks_pre_trainer(cfg, None)
    trainer = Trainer(Model(), args, train_dataset=Data(), callbacks=callbacks)
    plugin.post_trainer_create(cfg, trainer)
    trainer.train(resume_from_checkpoint=cfg.resume_from_checkpoint)
    return cfg


def test_the_second_start_resumes_from_what_the_first_one_stored(plugin: Any, tmp_path: Path) -> None:
    assert train(plugin, tmp_path, "first").resume_from_checkpoint is None
    resumed = train(type(plugin)(), tmp_path, "second").resume_from_checkpoint
    assert resumed == str(tmp_path / "second" / "checkpoint-2")


def test_a_checkpoint_in_the_configuration_wins_and_a_warning_says_so(
    plugin: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(plugin, tmp_path, "first")
    named = str(tmp_path / "first" / "checkpoint-2")
    with caplog.at_level(logging.WARNING):
        cfg = train(type(plugin)(), tmp_path, "second", 4, resume_from_checkpoint=named)
    assert cfg.resume_from_checkpoint == named
    assert f"The configuration names the checkpoint {named!r}" in caplog.text


def test_the_limit_of_the_configuration_holds_on_storage(plugin: Any, tmp_path: Path) -> None:
    train(plugin, tmp_path, "first", 6, save_total_limit=1)
    assert [key.step for key in Catalog(Storage(str(tmp_path / "run"))).checkpoints()] == [6]


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_that_is_none_for_transformers_is_none_on_storage(
    plugin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(upload_queue, "MAX_WAITING", 3)  # steps of milliseconds outrun the uploads
    train(plugin, tmp_path, "first", 6, save_total_limit=limit)
    assert [key.step for key in Catalog(Storage(str(tmp_path / "run"))).checkpoints()] == [2, 4, 6]


def test_the_run_url_may_come_from_the_environment_and_one_must_be_there(
    plugin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = SimpleNamespace(cloudtrain_run_url=None, save_total_limit=None)
    with pytest.raises(ConfigurationError, match="No run URL was given"):
        plugin.add_callbacks_pre_trainer(cfg, None)
    monkeypatch.setenv(RUN_URL, str(tmp_path))
    assert isinstance(plugin.add_callbacks_pre_trainer(cfg, None)[0], CloudTrainCallback)


def test_the_keys_of_the_configuration_have_a_class_that_axolotl_finds(plugin: Any) -> None:
    module, _, name = plugin.get_input_args().rpartition(".")
    settings = getattr(importlib.import_module(module), name)
    assert settings(cloudtrain_run_url="s3://b/r").cloudtrain_run_url == "s3://b/r"
