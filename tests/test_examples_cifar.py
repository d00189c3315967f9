"""The CIFAR example: both scripts train, report wrong options, and resume exactly."""

from __future__ import annotations

import ast
import importlib
import json
import pickle
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_cloudtrain.tracking.history import read_history
from tests.cifar_files import CLASSES, names_of, python2, write_set

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "cifar"
_ONE: list[bytes] = []
"""The checkpoint of a first epoch, which is trained once."""
# Python 3.12 and later, where a data loader forks a process that has threads.
fork_is_fine = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")


@pytest.fixture(autouse=True)
def example_on_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", [str(EXAMPLE), *sys.path])
    monkeypatch.chdir(tmp_path)
    yield
    for name in ("main", "finetune"):
        sys.modules.pop(name, None)  # other examples can have files with the same names
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(params=CLASSES)
def dataset(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with both datasets, generated, in the original layout."""
    folder = tmp_path / "data"
    for name in CLASSES:
        write_set(folder, name)
    return folder


@pytest.fixture
def epochs_set(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The epochs that were set on the dataset, in order."""
    epochs: list[int] = []
    cifar_data = importlib.import_module("cifar_data")
    set_epoch = cifar_data.CifarDataset.set_epoch

    def note(dataset: Any, epoch: int) -> None:
        epochs.append(epoch)
        set_epoch(dataset, epoch)

    monkeypatch.setattr(cifar_data.CifarDataset, "set_epoch", note)
    return epochs


class TestMain:
    """200 images in batches of 40: five steps in an epoch."""

    TINY = ("--use-cpu", "--data-path", "data", "--batch-size", "40", "--num-dataloader-workers", "0")

    @pytest.fixture
    def train(self, data) -> Callable[..., None]:
        script = importlib.import_module("main")

        def train(*words: str) -> None:
            script.main([*self.TINY, *words])

        return train

    @pytest.fixture
    def trained_once(self, train) -> None:
        """The folder `one` as one epoch saves it."""
        if not _ONE:
            train("--total-epochs", "1", "--save", "one")
            _ONE.append(Path("one/checkpoint.pt").read_bytes())
        Path("one").mkdir(exist_ok=True)
        Path("one/checkpoint.pt").write_bytes(_ONE[0])

    def test_the_loss_decreases_and_the_classes_are_learned(self, train, capsys):
        train("--total-epochs", "16", "--log-interval", "1", "--test-interval", "40")
        output = capsys.readouterr().out
        losses = [float(text) for text in re.findall(r" loss = ([0-9.]+), learning rate", output)]
        assert len(losses) == 80
        assert mean(losses[-5:]) < 0.5 * mean(losses[:5])
        before, after = map(float, re.findall(r"accuracy = ([0-9.]+)%", output))
        assert after > max(50.0, before)
        (log,) = Path().glob("hf_cloudtrain_*.log")
        records = [json.loads(line) for line in log.read_text().splitlines()]
        assert [record["step"] for record in records] == list(range(1, 81))
        assert records[-1]["loss"] == pytest.approx(losses[-1], abs=1e-5)

    @fork_is_fine
    @pytest.mark.parametrize("step", [7, 10])
    def test_resumed_from_storage_it_ends_with_the_weights_of_an_uninterrupted_run(
        self, train, tmp_path, step
    ):
        def weights(machine: str, run: str, workers: int) -> dict[str, torch.Tensor]:
            words = ["--save", machine, "--run-url", f"file://{tmp_path / run}", "--save-interval", str(step)]
            train(*words, "--total-epochs", "3", "--num-dataloader-workers", str(workers))
            return torch.load(f"{machine}/checkpoint.pt", weights_only=True)["model"]

        uninterrupted = weights("machine-1", "whole", workers=0)
        cut_after(tmp_path, step)  # of 15: within the second epoch, or at its end
        resumed = weights("machine-2", "cut", workers=2)
        history, whole = (read_history(f"file://{tmp_path / run}") for run in ("cut", "whole"))
        first, second = history.attempts
        assert (second.resumed_from, second.first_step, second.last_step) == (first.checkpoints[0], step, 15)
        assert (second.state, second.checkpoints[-1].step) == ("finished", 15)
        assert max_difference(resumed, uninterrupted) == 0.0
        assert [(log["step"], log["loss"]) for log in history.logs] == [
            (log["step"], log["loss"]) for log in whole.logs
        ]

    def test_each_epoch_has_its_own_augmentation(self, train, epochs_set):
        train("--total-epochs", "1", "--save", "one")
        train("--total-epochs", "3", "--save", "one")
        assert epochs_set == [0, 0, 1, 2]  # the second start finds that epoch 0 is complete

    def test_without_a_run_it_continues_from_its_own_folder_or_a_different_one(self, train):
        train("--total-epochs", "1", "--save", "one")
        assert torch.load("one/checkpoint.pt", weights_only=True)["step"] == 5
        train("--total-epochs", "2", "--save", "one", "--save-interval", "6")
        train("--total-epochs", "3", "--load", "one", "--save", "other")
        for folder, step in (("one", 10), ("other", 15)):
            content = torch.load(f"{folder}/checkpoint.pt", weights_only=True)
            assert content["step"] == step
            assert content["sampler"]["samples_seen"] == 200
            assert content["sampler"]["epoch"] == step / 5 - 1

    @pytest.mark.parametrize(
        ("words", "problem"),
        [
            (["--model", "vit-tiny"], "--model small, not vit-tiny"),
            (["--dataset", "cifar100"], "--dataset cifar10, not cifar100"),
            (["--seed", "1"], "--seed 0, not 1"),
            (["--batch-size", "20"], "batches of 40 .*, not 20. Set --batch-size"),
        ],
    )
    def test_options_that_do_not_match_the_checkpoint_are_named(self, train, trained_once, words, problem):
        with pytest.raises(SystemExit, match=f"checkpoint in 'one' was saved with {problem}"):
            train("--total-epochs", "2", "--save", "one", *words)

    def test_a_checkpoint_that_does_not_belong_to_the_run_is_refused(self, train, trained_once, tmp_path):
        with pytest.raises(SystemExit, match=r"'one' holds a checkpoint of step 5 .*different --save"):
            train("--total-epochs", "2", "--save", "one", "--run-url", f"file://{tmp_path / 'run'}")

    def test_a_start_after_the_last_step_is_an_error(self, train, trained_once):
        with pytest.raises(SystemExit, match=r"step 5, and 1 epochs have 5 steps.*Raise --total-epochs"):
            train("--total-epochs", "1", "--save", "one")

    def test_a_failed_save_keeps_the_previous_checkpoint(self, train, trained_once, monkeypatch):
        before = Path("one/checkpoint.pt").read_bytes()

        def save(content: object, path: Path) -> None:
            path.write_bytes(b"half of it")
            raise OSError("the disk is full")

        monkeypatch.setattr(torch, "save", save)
        with pytest.raises(OSError, match="full"):
            train("--total-epochs", "2", "--save", "one")
        assert Path("one/checkpoint.pt").read_bytes() == before

    def test_a_checkpoint_that_calls_a_function_is_refused(self, train, tmp_path):
        Path("one").mkdir()
        Path("one/checkpoint.pt").write_bytes(b"\x80\x02cos\nsystem\n" + python2("touch owned") + b"\x85R.")
        with pytest.raises(pickle.UnpicklingError):
            train("--total-epochs", "2", "--save", "one")
        assert not (tmp_path / "owned").exists()

    def test_the_environment_can_name_the_run_and_the_folder(self, train, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_CLOUDTRAIN_RUN_URL", f"file://{tmp_path / 'run'}")
        monkeypatch.setenv("HF_CLOUDTRAIN_CHECKPOINT_DIR", "one")
        train("--total-epochs", "1")
        assert (tmp_path / "run" / "checkpoint-5" / "checkpoint.pt").is_file()

    def test_on_a_machine_without_an_accelerator_the_error_names_the_option(self, data, monkeypatch):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
        with pytest.raises(SystemExit, match="Add --use-cpu"):
            importlib.import_module("main").main(["--data-path", "data"])

    @pytest.mark.parametrize(
        "words", [["--batch-size", "0"], ["--save-interval", "-1"], ["--total-epochs", "x"]]
    )
    def test_numbers_that_are_not_positive_are_refused(self, words, capsys):
        with pytest.raises(SystemExit):
            importlib.import_module("main").parse(words)
        assert f"argument {words[0]}: '{words[1]}' must be a positive integer" in capsys.readouterr().err

    def test_a_run_without_a_folder_is_refused_with_the_option(self, capsys):
        with pytest.raises(SystemExit):
            importlib.import_module("main").parse(["--run-url", "s3://bucket/run"])
        assert "Add --save DIR" in capsys.readouterr().err

    def test_all_lines_of_the_library_are_marked(self):
        lines = (EXAMPLE / "main.py").read_text().splitlines()
        ours = [
            line
            for line in lines
            if re.search(r"\bct\.|sampler.advance|hf_cloudtrain as|HF_CLOUDTRAIN", line)
        ]
        assert [line for line in ours if "  # cloud: " not in line] == []
        assert len(ours) == 12


class TestFinetune:
    TINY = ("--dataset", "cifar100", "--max_eval_samples", "16", "--disable_tqdm", "true")

    @pytest.fixture
    def finetune(self) -> ModuleType:
        return importlib.import_module("finetune")

    def test_a_model_from_a_configuration_is_saved_with_its_class_names(self, finetune, data, dataset):
        options = ["--data_path", str(data), "--max_train_samples", "32", "--max_steps", "2"]
        metrics = finetune.main([*self.TINY, "--dataset", dataset, *options])
        assert 0 <= metrics["eval_accuracy"] <= 1
        config = AutoModelForImageClassification.from_pretrained("cifar-output/final").config
        assert list(config.id2label.values()) == names_of(dataset)
        assert Path("cifar-output/checkpoint-2/trainer_state.json").is_file()

    def test_the_loss_decreases(self, finetune, data):
        options = ["--data_path", str(data), "--num_train_epochs", "6", "--per_device_train_batch_size", "16"]
        finetune.main([*self.TINY, "--dataset", "cifar10", *options, "--logging_steps", "13"])
        history = json.loads(Path("cifar-output/trainer_state.json").read_text())["log_history"]
        losses = [record["loss"] for record in history if "loss" in record]
        assert losses[-1] < 0.7 * losses[0]

    def test_a_model_from_a_folder_gets_its_image_size_its_normalisation_and_a_new_head(
        self, finetune, data, tmp_path
    ):
        source = tmp_path / "pretrained"
        small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
        ViTForImageClassification(ViTConfig(image_size=48, **small, num_labels=7)).save_pretrained(source)
        half = [0.5, 0.5, 0.5]
        preprocessor = {"size": {"height": 48, "width": 48}, "image_mean": half, "image_std": half}
        preprocessor["image_processor_type"] = "ViTImageProcessor"
        (source / "preprocessor_config.json").write_text(json.dumps(preprocessor))
        options = ["--data_path", str(data), "--model_name_or_path", str(source), "--max_steps", "1"]
        finetune.main([*self.TINY, *options])
        trained = ViTForImageClassification.from_pretrained("cifar-output/final")
        assert (trained.config.image_size, trained.config.num_labels) == (48, 100)
        assert list(AutoImageProcessor.from_pretrained("cifar-output/checkpoint-1").image_mean) == half

        train, _ = finetune.load_data(
            *finetune.parse(options)[:1], 0, AutoImageProcessor.from_pretrained(source)
        )
        batch = finetune.Collator((48, 48))([train[0], train[1]])
        assert batch["pixel_values"].shape == (2, 3, 48, 48)
        assert batch["pixel_values"].abs().max() <= 1
        assert batch["labels"].tolist() == train.labels[:2]

    @pytest.mark.parametrize(
        ("size", "config", "expected"),
        [
            ({"height": 5, "width": 6}, 7, (5, 6)),
            ({"shortest_edge": 8}, 7, (8, 8)),
            (None, 7, (7, 7)),
            (None, [5, 6], (5, 6)),
            (None, None, (32, 32)),
        ],
    )
    def test_the_size_comes_from_the_processor_else_the_model_else_cifar(
        self, finetune, size, config, expected
    ):
        model_config, processor = SimpleNamespace(image_size=config), SimpleNamespace(size=size)
        assert finetune.image_size(model_config, processor if size else None) == expected

    def test_each_epoch_has_its_own_augmentation(self, finetune, data, epochs_set):
        options = ["--data_path", str(data), "--max_train_samples", "16", "--num_train_epochs", "3"]
        finetune.main([*self.TINY, *options])
        assert sorted(set(epochs_set)) == [0, 1, 2]
        assert epochs_set == sorted(epochs_set)

    @pytest.mark.parametrize("option", ["--dataset", "--model"])
    def test_an_unknown_choice_is_refused_with_the_known_ones(self, finetune, option):
        with pytest.raises(ValueError, match=rf"{option} 'mnist'.*Choose one of .*(cifar10|small)"):
            finetune.parse([option, "mnist"])

    @fork_is_fine
    def test_resumed_from_storage_it_ends_with_the_weights_of_an_uninterrupted_run(
        self, finetune, data, tmp_path
    ):
        def train(machine: str, run: str, workers: int = 0) -> dict[str, torch.Tensor]:
            options = ["--output_dir", str(tmp_path / machine), "--run_url", f"file://{tmp_path / run}"]
            options += ["--data_path", str(data), "--per_device_train_batch_size", "8", "--save_steps", "7"]
            options += ["--num_train_epochs", "3", "--dataloader_num_workers", str(workers)]
            finetune.main([*self.TINY, *options])
            return load_file(tmp_path / run / "final" / "model.safetensors")

        uninterrupted = train("machine-1", "whole")
        cut_after(tmp_path, 7)  # of 15 steps: in the second epoch
        resumed = train("machine-2", "cut", workers=2)
        first, second = read_history(f"file://{tmp_path / 'cut'}").attempts
        assert (second.resumed_from, second.first_step, second.last_step) == (first.checkpoints[0], 7, 15)
        assert max_difference(resumed, uninterrupted) == 0.0

    def test_without_the_marked_lines_it_is_a_plain_script_that_trains(self, data):
        lines = (EXAMPLE / "finetune.py").read_text().splitlines(keepends=True)
        marked = [line for line in lines if "  # cloud: " in line]
        plain = "".join(line for line in lines if line not in marked)
        assert len(marked) <= 9
        names = {node.id for node in ast.walk(ast.parse(plain)) if isinstance(node, ast.Name)}
        assert not {name for name in names if "cloud" in name.lower()}
        module = ModuleType("finetune_plain")
        sys.modules[module.__name__] = module
        try:
            exec(compile(plain, "finetune_plain.py", "exec"), module.__dict__)
            module.main([*self.TINY, "--data_path", str(data), "--max_steps", "1"])
        finally:
            del sys.modules[module.__name__]
        assert Path("cifar-output/final/model.safetensors").is_file()


def cut_after(folder: Path, step: int) -> None:
    """Copy the run `whole` to `cut`, as if its machine had died after the step: without a manifest, a checkpoint does not exist."""
    shutil.copytree(folder / "whole", folder / "cut")
    shutil.rmtree(folder / "cut" / "final", ignore_errors=True)
    records = folder / "cut" / ".cloudtrain"
    for name in ("claims/final", "folders/final-000001"):
        (records / f"{name}.json").unlink(missing_ok=True)
    for manifest in (records / "checkpoints").iterdir():
        if int(manifest.stem.split("-")[1]) > step:
            manifest.unlink()


def max_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[key] - other[key]).abs().max()) for key in one)
