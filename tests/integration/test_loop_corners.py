"""TrainLoop: what a checkpoint records about itself, and rare cases."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
from hf_cloudtrain.errors import ConfigurationError, ManifestError
from hf_cloudtrain.integrations.loop.loop import TrainLoop
from hf_cloudtrain.integrations.loop.steps import LoopRun
from hf_cloudtrain.resume.optimizer_steps import OptimizerSteps
from hf_cloudtrain.storage.client import Storage
from tests.integration import _loops
from tests.integration._loops import KilledError, Rows, StatefulStream, difference, train


@pytest.fixture(autouse=True)
def _alone() -> Any:
    _loops.forget_accelerate()
    yield
    _loops.forget_accelerate()


def manifests(run: Path) -> list[Any]:
    catalog = Catalog(Storage(str(run)))
    return [catalog.read(key) for key in catalog.checkpoints()]


def killed(folder: Path, step: int, dataset: Any, **arguments: Any) -> None:
    with pytest.raises(KilledError):
        train(folder / "run", folder / "one", dataset, kill=step, **arguments)


def test_a_manifest_tells_the_position(tmp_path: Path) -> None:
    killed(tmp_path, 3, Rows(20), accumulation=2, epochs=3)
    position = manifests(tmp_path / "run")[0].position
    assert (position.global_step, position.samples_seen, position.epoch) == (2, 16, 0.8)
    assert position.max_steps == 9, "five batches an epoch are three steps"
    assert position.fingerprint is not None
    train(tmp_path / "run", tmp_path / "two", Rows(20), accumulation=2, epochs=3)
    assert manifests(tmp_path / "run")[-1].position.fingerprint is None, (
        "an order exists within an epoch only"
    )


def test_an_inexact_checkpoint_records_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_cloudtrain.resume.loader_state.fills_up", lambda loader: True)
    train(tmp_path / "run", tmp_path / "out", StatefulStream(20))
    found = {item.step: (item.exact, item.inexact_reason) for item in manifests(tmp_path / "run")}
    assert found[10] == (True, None)
    within = [reason for step, (exact, reason) in found.items() if step not in (5, 10) and not exact]
    assert within
    assert all("filled up with its first one" in reason for reason in within)


def test_the_seed_is_recorded(tmp_path: Path) -> None:
    train(tmp_path / "run", tmp_path / "out", Rows(20), seed=7)
    assert json.loads((tmp_path / "out" / "last" / "training_state.json").read_text())["seed"] == 7


def test_the_seed_of_a_seedable_sampler_is_that_of_the_first_attempt(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"config": {"use_seedable_sampler": True}}
    whole, batches, _ = train(tmp_path / "plain", tmp_path / "whole", Rows(20), seed=1, **arguments)
    killed(tmp_path, 3, Rows(20), seed=1, **arguments)
    resumed, rest, _ = train(tmp_path / "run", tmp_path / "two", Rows(20), seed=2, **arguments)
    assert rest == batches[2:]
    assert difference(whole, resumed) == 0.0


def test_unfinished_folders_of_a_killed_process_are_removed_at_the_start(tmp_path: Path) -> None:
    killed(tmp_path, 3, Rows(20))
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    half = tmp_path / "one" / "_cloudtrain" / f"saving-4-{gone.pid}-{0:08x}"
    half.mkdir()
    train(tmp_path / "run", tmp_path / "one", Rows(20))
    assert not half.exists()


def test_the_best_of_the_newest_attempt_is_downloaded_without_files_that_only_a_resume_needs(
    tmp_path: Path,
) -> None:
    train(tmp_path / "run", tmp_path / "one", Rows(20), seed=1)
    train(tmp_path / "run", tmp_path / "two", Rows(20), seed=2, fresh=True)  # the same steps, other weights
    train(tmp_path / "run", tmp_path / "three", Rows(20))
    state = json.loads((tmp_path / "three" / "best" / "training_state.json").read_text())
    assert state["seed"] == 2
    assert {path.name for path in (tmp_path / "three" / "best").iterdir()} == {
        "model.safetensors",
        "training_state.json",
    }


def test_a_checkpoint_whose_state_names_a_different_step_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_cloudtrain.integrations.loop.state import LoopState

    encode = LoopState.encode
    monkeypatch.setattr(LoopState, "encode", lambda self: encode(self).replace('"step": 2', '"step": 3'))
    killed(tmp_path, 3, Rows(20))
    with pytest.raises(ManifestError, match=r"is of step 3"):
        train(tmp_path / "run", tmp_path / "two", Rows(20))


def test_automatic_naming_is_restored_after_a_save(tmp_path: Path) -> None:
    seen: list[bool] = []
    accelerators: list[Accelerator] = []

    def name_them(accelerator: Accelerator) -> None:
        accelerator.project_configuration.automatic_checkpoint_naming = True
        accelerators.append(accelerator)

    train(
        tmp_path / "run",
        tmp_path / "out",
        Rows(20),
        prepared=name_them,
        inside=lambda loop: seen.append(accelerators[0].project_configuration.automatic_checkpoint_naming),
    )
    assert seen == [True] * 10


def test_weights_that_a_hook_of_the_user_writes_are_not_changed(tmp_path: Path) -> None:
    from safetensors.torch import load_model, save_model

    def register(accelerator: Accelerator) -> None:
        def save(models: list[Any], weights: list[Any], folder: str) -> None:
            for model in models:
                os.makedirs(f"{folder}/unet")
                save_model(accelerator.unwrap_model(model), f"{folder}/unet/weights.safetensors")
                weights.pop()

        def load(models: list[Any], folder: str) -> None:
            while models:
                load_model(accelerator.unwrap_model(models.pop()), f"{folder}/unet/weights.safetensors")

        accelerator.register_save_state_pre_hook(save)
        accelerator.register_load_state_pre_hook(load)

    found = _loops.through_kills(tmp_path, lambda: Rows(20), prepared=register)
    assert found["difference"] == 0.0
    names = {path.name for path in (tmp_path / "run" / "checkpoint-2").iterdir()}
    assert "unet" in names
    assert "model.safetensors" not in names


def test_leaving_an_epoch_with_break_within_an_accumulation_does_not_save_its_last_step_twice(
    tmp_path: Path,
) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = torch.utils.data.DataLoader(Rows(40), batch_size=4)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    loop = _loops.TrainLoop(
        accelerator, str(tmp_path / "run"), num_epochs=1, save_steps=2, output_dir=tmp_path / "out"
    )
    for _ in loop.epochs():
        for number, batch in enumerate(loop.steps(batches)):
            with accelerator.accumulate(model):
                accelerator.backward(model(batch["x"]).sum())
                optimizer.step()
                optimizer.zero_grad()
            if number == 4:  # the first of two batches, right after the save of step 2
                loop._checkpointer.upload_queue.wait(60)
                break
        loop.end_epoch({"loss": 1.0})
    assert [(item.step, item.position.epoch) for item in manifests(tmp_path / "run")] == [(2, 0.4), (3, 1.0)]
    assert manifests(tmp_path / "run")[-1].metrics == {"eval_loss": 1.0}


@pytest.mark.parametrize("name", ["begin", "watch", "finish"])
@pytest.mark.parametrize(("error", "state"), [(KeyboardInterrupt, "stopped"), (OSError, "failed")])
def test_what_fails_between_the_epochs_leaves_nothing_behind_in_a_notebook(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: type[BaseException], state: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    before = signal.getsignal(signal.SIGTERM)
    owner = {"begin": LoopRun, "watch": OptimizerSteps, "finish": Checkpointer}[name]
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(error):
        train(tmp_path / "run", tmp_path / "out", Rows(20))
    progress = Catalog(Storage(str(tmp_path / "run"))).attempts.read_progress(1)
    assert progress is not None
    assert progress["state"] == state
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_loader_without_batches_leaves_the_resumed_position_to_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, batches, _ = train(tmp_path / "plain", tmp_path / "whole", Rows(20))
    killed(tmp_path, 3, Rows(20))
    original = TrainLoop.steps

    def steps(loop: TrainLoop, loader: Any) -> Iterator[Any]:
        with pytest.raises(ConfigurationError, match="yielded no batches"):
            next(original(loop, torch.utils.data.DataLoader(Rows(0), batch_size=4)))
        yield from original(loop, loader)

    monkeypatch.setattr(TrainLoop, "steps", steps)
    _, rest, _ = train(tmp_path / "run", tmp_path / "two", Rows(20))
    assert rest == batches[2:]


@pytest.mark.ordinary_saves
def test_a_pending_save_happens_though_the_next_batch_cannot_be_read(tmp_path: Path) -> None:
    class Damaged(Rows):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            if index == 12:
                raise ValueError("a damaged sample")
            return super().__getitem__(index)

    with pytest.raises(ValueError, match="a damaged sample"):
        train(
            tmp_path / "run",
            tmp_path / "out",
            Damaged(20),
            save_steps=3,
            prepare=False,
            loader=lambda: {"shuffle": False},
        )
    assert (tmp_path / "out" / "checkpoint-3" / "training_state.json").is_file()


def test_iterating_a_loader_with_persistent_workers_before_the_loop_changes_nothing(tmp_path: Path) -> None:
    """A pool of persistent workers keeps the sampler that it was created with."""

    def look(accelerator: Accelerator) -> None:
        next(iter(accelerator._dataloaders[0]))

    found = _loops.through_kills(
        tmp_path,
        lambda: Rows(20),
        workers=1,
        loader=lambda: {"persistent_workers": True},
        prepared=look,
    )
    assert found["difference"] == 0.0
    assert found["batches"] == found["uninterrupted"]
    assert found["steps"] == 10
