"""What each finding says of a training, planted in a Trainer that trains a few steps in this process."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import load_dataset
from safetensors.torch import load_file
from torch.utils.data import Dataset, IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_cloudtrain import CheckpointUploadCallback
from hf_cloudtrain.checkpoints import upload_queue
from hf_cloudtrain.checkpoints.completion import Completion
from hf_cloudtrain.checkpoints.exactness import Exactness
from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.integrations.trainer import known_trainers, outside_state
from hf_cloudtrain.integrations.trainer.outside_state import OutsideState
from hf_cloudtrain.runtime.ranks import Ranks
from hf_cloudtrain.storage.client import Storage
from tests.unit.integrations.trainer.test_known_trainers import Weighted


class Model(torch.nn.Module):
    def __init__(self, **values: Any) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        for name, value in values.items():
            setattr(self, name, value)

    def forward(self, x: torch.Tensor, labels: Any = None) -> dict[str, torch.Tensor]:
        if hasattr(self, "calls"):
            self.calls += 1
        return {"loss": self.layer(torch.nn.functional.dropout(x)).square().mean()}


class Data(Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": torch.full((2,), float(index))}


class Augmented(Data):
    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": torch.full((2,), float(index)) + torch.rand(2)}


class Rarely(Data):
    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": torch.rand(2) if index > 100 else torch.zeros(2)}


class Curriculum(Data):
    reads = 0

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.reads += 1
        return super().__getitem__(index)


class OwnGenerator(Data):
    def __init__(self) -> None:
        self.chance = random.Random(0)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": torch.full((2,), self.chance.random())}


class Seeded(Data):
    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        random.seed(index)
        return {"x": torch.full((2,), random.random())}


class UnreadableError(Exception):
    pass


class Unreadable(dict):  # type: ignore[type-arg]
    def values(self) -> Any:
        raise UnreadableError("not now")


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return iter([Data()[index] for index in range(12)])


class OtherNames(Trainer):
    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, {f"0.{key}": value for key, value in self.model.state_dict().items()})


class OwnLoader(OtherNames):
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        saved = load_file(f"{resume_from_checkpoint}/model.safetensors")
        self.model.load_state_dict({key.removeprefix("0."): value for key, value in saved.items()})


class Mean(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.mean = model.layer.weight.detach().clone()


class Counts(TrainerCallback):
    def __init__(self) -> None:
        self.seen = 0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seen += 1


class Settings(TrainerCallback):
    def __init__(self) -> None:
        self.words, self.number = ["a", "b"], 3


class StopsEpoch(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_epoch_stop = state.global_step == 2


class Holds(TrainerCallback):
    def __init__(self) -> None:
        self.held = Unreadable()


class DrawsAtLog(TrainerCallback):
    def on_log(self, *_: Any, **__: Any) -> None:
        torch.rand(1)


class DrawsAtSave(TrainerCallback):
    def on_save(self, *_: Any, **__: Any) -> None:
        torch.rand(1)


class DrawsAtEpoch(TrainerCallback):
    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        torch.rand(1)


@pytest.fixture(autouse=True)
def every_save_is_uploaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload_queue, "MAX_WAITING", 100)


def trained(
    folder: Path,
    data: Any = None,
    *,
    model: Any = None,
    kind: type[Trainer] = Trainer,
    before: tuple[TrainerCallback, ...] = (),
    after: tuple[TrainerCallback, ...] = (),
    optimizer: Any = None,
    restore: bool = False,
    **arguments: Any,
) -> dict[int, Exactness]:
    """What the manifests say, by step; an epoch has three steps."""
    defaults = {"save_steps": 1, "logging_steps": 100, "max_steps": 4, "per_device_train_batch_size": 4}
    args = TrainingArguments(
        str(folder / "out"),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        **{**defaults, **arguments},
    )
    cloud = CheckpointUploadCallback(f"file://{folder}/run")
    model = Model() if model is None else model
    trainer = kind(
        model,
        args,
        train_dataset=data or Data(),
        callbacks=[*before, cloud, *after],
        optimizers=(optimizer, None),
    )
    trainer.train(resume_from_checkpoint=cloud.restore(args) if restore else None)
    catalog = cloud._session.checkpointer.catalog
    return {key.step: catalog.read(key).exactness for key in catalog.checkpoints()}


def test_a_plain_training_is_exact_at_every_step(tmp_path: Path) -> None:
    found = trained(tmp_path, after=(Settings(),), logging_steps=1)
    assert [found[step].exact for step in (1, 2, 3, 4)] == [True] * 4


@pytest.mark.parametrize(("kind", "exact"), [(OtherNames, False), (OwnLoader, True)])
def test_other_names_in_a_checkpoint_are_a_loss_unless_the_trainer_loads_them_in_its_own_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Trainer], *, exact: bool
) -> None:
    name = known_trainers.class_name(kind.__new__(kind))
    monkeypatch.setitem(known_trainers.KNOWN, name, known_trainers.as_tested)
    assert trained(tmp_path, kind=kind, max_steps=1)[1].exact is exact


def test_fetches_that_draw_are_exact_at_the_end_of_an_epoch_only(tmp_path: Path) -> None:
    found = trained(tmp_path, Augmented(), after=(DrawsAtLog(), Counts()), max_steps=2)
    assert [found[step].exact for step in (1, 2)] == [False, False]
    assert "random numbers are drawn as batches are fetched" in str(found[1].reason)
    found = trained(tmp_path / "alone", Augmented())
    assert [found[step].exact for step in (1, 2, 3, 4)] == [False, False, True, False]


@pytest.mark.parametrize(
    ("persistent", "answers"), [(False, [False, False, True, False]), (True, [False] * 4)]
)
def test_loader_processes_that_draw(tmp_path: Path, *, persistent: bool, answers: list[bool]) -> None:
    found = trained(tmp_path, Augmented(), dataloader_num_workers=1, dataloader_persistent_workers=persistent)
    assert [found[step].exact for step in (1, 2, 3, 4)] == answers
    assert "loader processes draw random numbers" in str(found[1].reason)


def test_a_stream_is_exact_in_its_first_pass_and_between_passes(tmp_path: Path) -> None:
    found = trained(tmp_path, Stream(), max_steps=5)
    assert [found[step].exact for step in (1, 2, 3, 4, 5)] == [True, True, True, False, False]
    assert "the stream was read 1 time before" in str(found[4].reason)


@pytest.mark.parametrize(
    ("setup", "answer", "word"),
    [
        ({"after": (Mean(),)}, None, "Mean holds tensors"),
        ({"before": (Counts(),)}, None, "Counts keeps state ('seen')"),
        ({"after": (DrawsAtLog(),), "logging_steps": 1}, True, ""),
        ({"after": (DrawsAtSave(),)}, False, "DrawsAtSave draws random numbers after a save"),
        ({"before": (DrawsAtSave(),)}, False, "DrawsAtSave draws random numbers after a save"),
        ({"data": Curriculum()}, None, "Curriculum (train_dataset) keeps state ('reads')"),
        ({"data": Rarely()}, None, "Rarely (train_dataset) may draw"),
        (
            {"data": OwnGenerator(), "dataloader_num_workers": 1},
            None,
            "state ('chance') that changes in the loader",
        ),
        ({"data": Seeded()}, None, "Seeded seeds random numbers"),
        ({"data": Seeded(), "dataloader_num_workers": 1}, None, "Seeded seeds random numbers"),
        ({"after": (StopsEpoch(),), "max_steps": 4}, False, "a callback ends this epoch early"),
        ({"after": (Holds(),)}, None, "a look at it ended with UnreadableError: not now"),
        ({"model": Model(calls=0)}, None, "'calls' of Model"),
        ({"model": Model(seen=torch.zeros(1))}, True, ""),
        ({"kind": Weighted}, None, "Weighted"),
        ({"save_only_model": True}, False, "save_only_model"),
        ({"ignore_data_skip": True}, False, "ignore_data_skip"),
    ],
)
def test_the_second_step_is(setup: dict[str, Any], answer: bool | None, word: str, tmp_path: Path) -> None:
    found = trained(tmp_path, **{"max_steps": 2, **setup})[2]
    assert found.exact is answer
    assert word in str(found.reason)


@pytest.mark.parametrize(
    ("setup", "answer"), [({"ignore_data_skip": True}, True), ({"after": (DrawsAtEpoch(),)}, None)]
)
def test_the_last_step_of_an_epoch_is(setup: dict[str, Any], answer: bool | None, tmp_path: Path) -> None:
    assert trained(tmp_path, **{"max_steps": 3, **setup})[3].exact is answer


def test_what_is_known_of_a_class_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = known_trainers.class_name(Weighted.__new__(Weighted))
    monkeypatch.setitem(
        known_trainers.KNOWN,
        name,
        lambda args, trainer: Exactness.no(f"{args.max_steps} {trainer.args.max_steps}"),
    )
    assert trained(tmp_path, kind=Weighted, max_steps=1)[1] == Exactness.no("1 1")


def test_weights_that_only_the_optimizer_knows(tmp_path: Path) -> None:
    model, loss = Model(), torch.nn.Linear(3, 1, bias=False)
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], 0.1)
    found = trained(tmp_path, model=model, optimizer=optimizer, max_steps=1)[1]
    assert (found.exact, "trains 1 tensor outside of the model" in str(found.reason)) == (False, True)
    assert "(1, 3)" in str(found.reason)


def test_the_names_in_a_file_that_is_not_written_yet_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[set[str]] = []
    names_in = outside_state._names_in

    def noted(*where: Any) -> set[str]:
        names.append(names_in(*where))
        return names[-1]

    monkeypatch.setattr(outside_state, "_names_in", noted)
    monkeypatch.setenv("HF_CLOUDTRAIN_ASYNC_SAVE", "1")
    large = Model(large=torch.nn.Parameter(torch.zeros(2**19)))  # smaller files are written at once
    trained(tmp_path, model=large, max_steps=2)
    assert [found - {"__metadata__"} for found in names] == [{"large", "layer.weight", "layer.bias"}] * 2


def test_a_run_that_ended_within_an_epoch_is_complete(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    setup = {"max_steps": -1, "num_train_epochs": 1.5}
    before = trained(tmp_path, **setup)
    caplog.clear()
    assert trained(tmp_path, restore=True, **setup) == before
    assert (
        "The run is complete: step 5 of 5. Nothing is trained. To train on, raise num_train_epochs."
        in caplog.text
    )
    assert max(trained(tmp_path, restore=True, **{**setup, "num_train_epochs": 2})) == 6


@pytest.mark.parametrize(
    ("planned", "end"), [({"max_steps": 9.0}, "step 4 of 9. "), ({"num_epochs": 3}, "step 4. ")]
)
def test_a_run_that_a_callback_ended_is_complete(
    planned: dict[str, float], end: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained(tmp_path)
    Completion(1, 4, planned).write(Storage(f"file://{tmp_path}/run"))
    trained(tmp_path, restore=True, max_steps=9)
    assert f"The run is complete: a callback ended training at {end}Nothing is trained." in caplog.text


def test_a_different_model_is_refused_before_the_download(tmp_path: Path) -> None:
    trained(tmp_path, max_steps=1)
    wider = Model(more=torch.nn.Linear(2, 2))
    with pytest.raises(
        ConfigurationError, match="checkpoint-1 is of a different model: it has 2 tensors, 3 val"
    ):
        trained(tmp_path, model=wider, restore=True, max_steps=2)


def test_arguments_and_data_that_differ_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"x": torch.full((2,), float(index))} for index in range(12)]
    trained(tmp_path, rows, max_steps=1, learning_rate=1e-3)
    caplog.clear()
    rows[6]["x"] += 1
    trained(tmp_path, rows, restore=True, max_steps=2, learning_rate=1e-4)
    text = caplog.text
    assert "learning_rate was 0.001, is 0.0001; max_steps was 1, is 2" in text
    assert "trained on data with different content" in text


@pytest.mark.parametrize(
    ("changed", "level", "says"),
    [
        (None, "INFO", "the same content in the 64 rows that were compared"),
        (50, "WARNING", "trained on data with different content"),
    ],
)
def test_the_same_files_on_a_different_machine_are_no_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, changed: int | None, level: str, says: str
) -> None:
    def loaded(machine: str, changed: int | None = None) -> Any:
        rows = [{"x": [float(number), float(number == changed)]} for number in range(100)]
        folder = tmp_path / machine
        folder.mkdir()
        (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return load_dataset("json", data_dir=str(folder), split="train", cache_dir=str(folder / "cache"))

    first, second = loaded("first"), loaded("second", changed)
    assert first._fingerprint != second._fingerprint
    trained(tmp_path, first, max_steps=1)
    caplog.clear()
    with caplog.at_level("INFO"):
        trained(tmp_path, second, restore=True, max_steps=2)
    assert [one.levelname for one in caplog.records if says in one.getMessage()] == [level]


def test_the_strongest_finding_of_all_ranks_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_cloudtrain.integrations.trainer import exactness

    no, ranks = Exactness.no("rank 1 draws"), Ranks(0, 2)
    monkeypatch.setattr(
        Ranks, "begin_largest", lambda *_: type("Done", (), {"result": lambda _: [2.0, 0.0]})()
    )
    monkeypatch.setattr(Ranks, "each", lambda _, work, __: [work(), no])
    assert exactness.strongest(Exactness(), ranks) == no


@pytest.mark.parametrize(("adapter", "exact"), [(True, None), (False, True)])
def test_the_checkpoint_of_a_sharded_adapter_is_not_verified(
    adapter: bool, exact: bool | None, tmp_path: Path
) -> None:
    model = SimpleNamespace(peft_config={}) if adapter else SimpleNamespace()
    trainer = SimpleNamespace(model=model, is_fsdp_enabled=True, is_deepspeed_enabled=False)
    of_trainer: Any = SimpleNamespace(_trainer=trainer)
    assert OutsideState._of_checkpoint(of_trainer, tmp_path, {}).exact is exact
