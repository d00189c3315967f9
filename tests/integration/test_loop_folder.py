"""What a TrainLoop writes to the disk and to storage: models that `from_pretrained` loads, on any machine."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertTokenizer,
    set_seed,
)
from typer.testing import CliRunner

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.cli import app
from hf_cloudtrain.integrations.loop.loop import TrainLoop
from hf_cloudtrain.integrations.loop.state import LoopState, publish, repair
from hf_cloudtrain.storage.client import Storage
from tests.integration import _loops

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]


@pytest.fixture(autouse=True)
def _alone() -> Any:
    _loops.forget_accelerate()
    yield
    _loops.forget_accelerate()


def config(**changes: Any) -> BertConfig:
    return BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        **changes,
    )


def train(
    run: Path,
    out: Path,
    *,
    losses: tuple[float, ...],
    model: Any = None,
    rate: float = 0.1,
    resume_only: bool = False,
    prepared: Callable[[Accelerator], None] = lambda accelerator: None,
    **arguments: Any,
) -> tuple[Any, TrainLoop]:
    """Two steps an epoch, whose evaluations find these losses; starts where the run stands."""
    _loops.forget_accelerate()
    set_seed(0)
    tokenizer = BertTokenizer(vocab={word: at for at, word in enumerate(WORDS)})
    accelerator = Accelerator(cpu=True)
    rows = [
        {"input_ids": torch.tensor([2, 5 + at % 3, 3]), "labels": torch.tensor(at % 2)} for at in range(4)
    ]
    model = BertForSequenceClassification(config()) if model is None else model
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=rate)
    model, optimizer, batches = accelerator.prepare(model, optimizer, DataLoader(rows, batch_size=2))
    prepared(accelerator)
    loop = TrainLoop(
        accelerator,
        str(run),
        num_epochs=len(losses) or 1,
        output_dir=out,
        processing_class=tokenizer,
        **{"metric_for_best_model": "loss", **arguments},
    )
    if resume_only:
        assert loop.resume() is not None
        return accelerator.unwrap_model(model), loop
    for epoch in loop.epochs():
        for batch in loop.steps(batches):
            labels = batch["labels"] if model.config.architectures is None else batch["input_ids"]
            loss = model(input_ids=batch["input_ids"], labels=labels).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            loop.log(loss=loss)
        loop.end_epoch({"loss": losses[epoch], "accuracy": 1 - losses[epoch]})
    return accelerator.unwrap_model(model), loop


def same_weights(one: Any, other: Any) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return set(mine) == set(theirs) and all(torch.equal(mine[name], theirs[name]) for name in mine)


def state_in(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "training_state.json").read_text())
    return record


class TestBestAndLast:
    def test_both_load_with_their_tokenizer_and_record_their_step(self, tmp_path: Path) -> None:
        secret = {"learning_rate": 0.1, "hub_token": "hf_abcdef", "data_dir": Path("data")}
        model, loop = train(tmp_path / "run", tmp_path / "out", losses=(0.5, 0.3, 0.4), script_args=secret)
        last = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "last")
        best = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "best")
        assert same_weights(last, model)
        assert not same_weights(best, model)
        for name, step, epoch in (("best", 4, 2), ("last", 6, 3)):
            folder = tmp_path / "out" / name
            assert AutoTokenizer.from_pretrained(folder).tokenize("good film") == ["good", "film"]
            state = state_in(folder)
            assert (state["step"], state["epoch"], state["best_metric"], state["seed"]) == (
                step,
                epoch,
                0.3,
                0,
            )
            assert state["script_args"] == {"learning_rate": 0.1, "hub_token": "***", "data_dir": "data"}
            assert not list(folder.glob("optimizer*"))
            assert AutoConfig.from_pretrained(folder).architectures == ["BertForSequenceClassification"]
        assert model.config.architectures is None
        assert loop.best_metric == 0.3

    def test_download_best_brings_the_best_folder_of_storage(self, tmp_path: Path) -> None:
        train(tmp_path / "run", tmp_path / "out", losses=(0.5, 0.3, 0.4))
        for flags, name in ((["--best"], "best"), ([], "last")):
            target = tmp_path / f"here-{name}"
            arguments = ["checkpoint", "download", str(tmp_path / "run"), str(target), *flags]
            answer = CliRunner().invoke(app, arguments)
            assert answer.exit_code == 0, answer.output
            folder = Path(answer.stdout.strip())
            brought = AutoModelForSequenceClassification.from_pretrained(folder)
            mine = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / name)
            assert same_weights(brought, mine)
            assert AutoTokenizer.from_pretrained(folder).tokenize("bad") == ["bad"]

    def test_a_different_machine_keeps_the_best_metric_and_downloads_best_at_the_end(
        self, tmp_path: Path
    ) -> None:
        train(tmp_path / "run", tmp_path / "one", losses=(0.5, 0.3))
        _, loop = train(tmp_path / "run", tmp_path / "two", losses=(0.5, 0.3, 0.4, 0.6))
        assert loop.best_metric == 0.3
        assert state_in(tmp_path / "two" / "best")["step"] == 4
        here, there = (
            AutoModelForSequenceClassification.from_pretrained(tmp_path / name / "best")
            for name in ("one", "two")
        )
        assert same_weights(here, there)
        log = json.loads((tmp_path / "two" / "log.json").read_text())
        assert [item["valid"]["loss"] for item in log] == [0.5, 0.3, 0.4, 0.6]

    @pytest.mark.parametrize(("began", "asked"), [("records", "epochs"), ("epochs", "records")])
    def test_a_run_keeps_the_form_of_its_log(self, tmp_path: Path, began: str, asked: str) -> None:
        train(tmp_path / "run", tmp_path / "one", losses=(0.5, 0.3), log_format=began)
        train(tmp_path / "run", tmp_path / "two", losses=(0.5, 0.3, 0.4), log_format=asked)
        log = json.loads((tmp_path / "two" / "log.json").read_text())
        if began == "epochs":
            assert list(log) == ["Epoch 0", "Epoch 1", "Epoch 2"]
            log = list(log.values())
        name = {"records": "valid", "epochs": "valid_log"}[began]
        assert [epoch[name]["loss"] for epoch in log] == [0.5, 0.3, 0.4]

    def test_greater_is_better_for_a_metric_that_is_not_a_loss(self, tmp_path: Path) -> None:
        arguments: dict[str, Any] = {"metric_for_best_model": "accuracy"}
        _, loop = train(tmp_path / "run", tmp_path / "out", losses=(0.5, 0.3, 0.4), **arguments)
        assert loop.best_metric == 0.7
        arguments["greater_is_better"] = False
        _, loop = train(tmp_path / "other", tmp_path / "other-out", losses=(0.5, 0.3, 0.4), **arguments)
        assert loop.best_metric == 0.5

    def test_an_equal_or_missing_metric_does_not_replace_the_best(self, tmp_path: Path) -> None:
        train(tmp_path / "run", tmp_path / "out", losses=(0.3, 0.3))
        assert state_in(tmp_path / "out" / "best")["step"] == 2
        arguments: dict[str, Any] = {"metric_for_best_model": None}
        train(tmp_path / "other", tmp_path / "other-out", losses=(0.3,), **arguments)
        assert not (tmp_path / "other-out" / "best").exists()

    def test_a_hand_edited_copy_does_not_harm_the_checkpoint(self, tmp_path: Path) -> None:
        train(tmp_path / "run", tmp_path / "out", losses=(0.3,))
        committed = (tmp_path / "out" / "checkpoint-2" / "config.json").read_text()
        (tmp_path / "out" / "last" / "config.json").write_text("{}")
        assert (tmp_path / "out" / "checkpoint-2" / "config.json").read_text() == committed

    def test_files_of_a_different_run_in_the_folder_are_replaced(self, tmp_path: Path) -> None:
        train(tmp_path / "other", tmp_path / "out", losses=(0.1, 0.2), rate=0.5)
        train(tmp_path / "run", tmp_path / "elsewhere", losses=(0.3, 0.4))
        train(tmp_path / "run", tmp_path / "out", losses=(0.3, 0.4))  # complete: nothing is trained
        for name in ("last", "best"):
            mine, theirs = (
                AutoModelForSequenceClassification.from_pretrained(tmp_path / folder / name)
                for folder in ("out", "elsewhere")
            )
            assert same_weights(mine, theirs)
        logs = [(tmp_path / folder / "log.json").read_text() for folder in ("out", "elsewhere")]
        assert logs[0] == logs[1]

    def test_a_disk_without_room_for_best_and_last_does_not_end_training(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def fail(*args: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("hf_cloudtrain.integrations.loop.folder.publish", fail)
        monkeypatch.setattr(LoopState, "write_log", fail)
        _, loop = train(tmp_path / "run", tmp_path / "out", losses=(0.3,))
        assert loop.global_step == 2
        assert "'log.json' could not be written" in caplog.text


class TestModels:
    @pytest.mark.parametrize("kind", ["tied", "channels last"])
    def test_shared_and_non_contiguous_weights_are_saved(self, tmp_path: Path, kind: str) -> None:
        def make() -> Any:
            set_seed(3)
            model: Any = torch.nn.Sequential(
                torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False)
            )
            if kind == "tied":
                model[1].weight = model[0].weight
            else:
                model.append(torch.nn.Conv2d(2, 4, 3).to(memory_format=torch.channels_last))
            return model

        results = []
        for out in ("one", "two"):
            _loops.forget_accelerate()
            accelerator = Accelerator(cpu=True)
            model = make()
            if out == "two":
                with torch.no_grad():
                    model[0].weight.zero_()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            model, batches = accelerator.prepare(model, DataLoader(torch.ones(4, 4), batch_size=2))
            optimizer = accelerator.prepare(optimizer)
            loop = TrainLoop(accelerator, str(tmp_path / "run"), num_epochs=1, output_dir=tmp_path / out)
            for _ in loop.epochs():
                for batch in loop.steps(batches):
                    accelerator.backward(model[1](model[0](batch)).mean())
                    optimizer.step()
                    optimizer.zero_grad()
            results.append(model)
        assert same_weights(*results)

    def test_weights_that_a_hook_of_the_user_writes_are_published(self, tmp_path: Path) -> None:
        def into_a_folder(models: list[Any], weights: list[Any], folder: str) -> None:
            for model in models:
                model.save_pretrained(os.path.join(folder, "unet"))
                weights.pop()

        def prepared(accelerator: Accelerator) -> None:
            accelerator.register_save_state_pre_hook(into_a_folder)

        train(tmp_path / "run", tmp_path / "out", losses=(0.3,), prepared=prepared)
        assert (tmp_path / "out" / "best" / "unet" / "model.safetensors").is_file()

    def test_tied_weights_load_again(self, tmp_path: Path) -> None:
        tied = config()
        tied.architectures = ["BertForMaskedLM"]
        model, _ = train(
            tmp_path / "run", tmp_path / "out", losses=(0.3,), model=BertForMaskedLM(tied), rate=0.5
        )
        loaded = BertForMaskedLM.from_pretrained(tmp_path / "out" / "last")
        assert same_weights(model, loaded)
        again, loop = train(
            tmp_path / "run", tmp_path / "two", losses=(), model=BertForMaskedLM(tied), resume_only=True
        )
        assert loop.global_step == 2
        assert same_weights(model, again)

    def test_an_adapter_is_saved_without_its_base_model_and_resumed(self, tmp_path: Path) -> None:
        from peft import LoraConfig, PeftModel, get_peft_model

        def adapted() -> Any:
            set_seed(7)
            base = BertForSequenceClassification(config())
            return get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))

        model, _ = train(tmp_path / "run", tmp_path / "out", losses=(0.3,), model=adapted())
        folder = tmp_path / "out" / "last"
        assert (folder / "adapter_model.safetensors").is_file()
        assert not (folder / "model.safetensors").exists()
        set_seed(7)
        loaded = PeftModel.from_pretrained(BertForSequenceClassification(config()), folder)
        assert same_weights(model, loaded)
        again, loop = train(tmp_path / "run", tmp_path / "two", losses=(), model=adapted(), resume_only=True)
        assert loop.global_step == 2
        assert same_weights(model, again)


class TestBackground:
    def test_replaced_checkpoints_are_deleted_by_the_end_of_the_process(self, tmp_path: Path) -> None:
        *_, loop = _loops.train(tmp_path / "run", tmp_path / "out", _loops.Rows(20))
        loop._folder._end()  # as the end of the process does
        assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-10"]
        assert [path.name for path in (tmp_path / "out/_cloudtrain").glob("[bgl]*-*")] == []

    def test_an_error_is_told_and_training_completes(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def broken(*paths: Path) -> Path:
            if threading.current_thread() is threading.main_thread():
                return publish(*paths)
            raise ValueError("a fault of ours")

        monkeypatch.setattr("hf_cloudtrain.integrations.loop.folder.publish", broken)
        *_, loop = _loops.train(tmp_path / "run", tmp_path / "out", _loops.Rows(20), save_steps=4)
        assert loop.global_step == 10
        assert "What keeps the output folder up to date" in caplog.text
        assert "a fault of ours" in caplog.text


class TestPublish:
    @pytest.fixture
    def folders(self, tmp_path: Path) -> tuple[Path, Path]:
        for step in (1, 2):
            folder = tmp_path / f"checkpoint-{step}"
            folder.mkdir()
            (folder / "model.safetensors").write_bytes(bytes([step]) * 2**20)
            (folder / "training_state.json").write_text(LoopState(step=step).encode())
        publish(tmp_path / "checkpoint-1", tmp_path / "best")
        return tmp_path / "checkpoint-2", tmp_path / "best"

    @pytest.mark.parametrize("killed_at", range(1, 5))
    def test_after_a_kill_at_any_moment_one_whole_folder_exists(
        self, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, killed_at: int
    ) -> None:
        new, best = folders
        calls = 0

        def killable(real: Any) -> Any:
            def call(*args: Any, **options: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == killed_at:
                    raise KeyboardInterrupt
                return real(*args, **options)

            return call

        with monkeypatch.context() as patched:
            patched.setattr(os, "link", killable(os.link))
            patched.setattr("shutil.copyfile", killable(__import__("shutil").copyfile))
            patched.setattr(os, "rename", killable(os.rename))
            try:
                publish(new, best)
            except KeyboardInterrupt:
                pass
            else:
                pytest.fail(f"there are only {calls} changes")
        monkeypatch.setattr(
            "hf_cloudtrain.runtime.files._making", set()
        )  # the process that created them has exited
        repair(best.parent)
        step = LoopState.read(best).step
        assert (best / "model.safetensors").read_bytes() == bytes([step]) * 2**20
        assert not list((best.parent / "_cloudtrain").glob("best-*"))

    def test_a_large_file_is_linked(self, folders: tuple[Path, Path]) -> None:
        publish(*folders)
        one, other = (folder / "model.safetensors" for folder in folders)
        assert one.stat().st_ino == other.stat().st_ino

    def test_pointers_on_storage_name_both(self, tmp_path: Path) -> None:
        train(tmp_path / "run", tmp_path / "out", losses=(0.3, 0.5))
        catalog = Catalog(Storage(str(tmp_path / "run")))
        best, last = catalog.pointer("best"), catalog.pointer("last")
        assert best is not None
        assert last is not None
        assert (best.step, last.step) == (2, 4)
        assert catalog.read(best).metrics == {"eval_loss": 0.3, "eval_accuracy": 0.7, "best_metric": 0.3}


@pytest.mark.parametrize("of_script", [False, True])
def test_in_a_job_run_and_folder_come_from_the_job_unless_the_script_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_script: bool
) -> None:
    monkeypatch.setenv(env.RUN_URL, str(tmp_path / "run"))
    monkeypatch.setenv(env.CHECKPOINT_DIR, str(tmp_path / "ckpt"))
    accelerator = Accelerator(cpu=True, project_dir=str(tmp_path / "own") if of_script else None)
    loop = TrainLoop(accelerator, num_epochs=1)
    assert loop.output_dir == tmp_path / ("own" if of_script else "ckpt")
    assert loop._checkpointer.storage.url == str(tmp_path / "run")
