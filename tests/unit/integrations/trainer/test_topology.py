"""What is converted for a Trainer, without running one; the integration tests do."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy
import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, StepLR
from torch.utils.data import DataLoader, RandomSampler
from transformers import Trainer, TrainerState, TrainingArguments

from hf_cloudtrain.checkpoints.manifest import FileEntry, Manifest, Position
from hf_cloudtrain.errors import PositionError
from hf_cloudtrain.integrations.trainer import topology
from hf_cloudtrain.integrations.trainer.position import EpochLength, position

SAVED = Position(
    global_step=9,
    samples_seen=36,
    world_size=1,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=1,
    max_steps=18,
    dataset_length=24,
    epoch_steps=6,
    data_seed=42,
    lr_scheduler="LambdaLR",
)


@pytest.fixture
def args(tmp_path: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=4, gradient_accumulation_steps=3
    )


def manifest(saved: Position = SAVED, *paths: str) -> Manifest:
    files = tuple(FileEntry(path, 1, "xxh3-128:" + "0f" * 16) for path in paths)
    return Manifest("000001-0000000009", "checkpoint-9", 1, saved.global_step, "n-9", files, saved)


def planned(args: TrainingArguments, saved: Position = SAVED) -> topology.Conversion:
    conversion = topology.plan(args, manifest(saved))
    assert conversion is not None
    return conversion


class TestPlan:
    def test_the_same_topology_needs_none(self, args: TrainingArguments) -> None:
        args.gradient_accumulation_steps = 1
        assert topology.plan(args, manifest()) is None

    def test_a_schedule_that_cannot_move_is_refused_before_the_download(
        self, args: TrainingArguments
    ) -> None:
        with pytest.raises(PositionError, match="'OneCycleLR', which depends on more"):
            planned(args, replace(SAVED, lr_scheduler="OneCycleLR"))

    def test_the_batch_size_that_trainer_found_by_itself_is_kept(self, args: TrainingArguments) -> None:
        args.auto_find_batch_size, args.per_device_train_batch_size = True, 8
        assert planned(args).global_step == 3

    def test_max_steps_must_be_counted_in_new_steps(self, args: TrainingArguments) -> None:
        args.max_steps = 6
        assert planned(args).global_step == 3
        args.max_steps = 18
        with pytest.raises(PositionError, match=r"max_steps=18 is counted in the new .* pass max_steps=6\."):
            planned(args)


class TestConvertState:
    RECORD: ClassVar[dict[str, Any]] = {
        "global_step": 9,
        "epoch": 1.5,
        "max_steps": 18,
        "train_batch_size": 4,
        "save_steps": 9,
        "logging_steps": 1,
        "eval_steps": 500,
        "best_metric": 0.5,
        "log_history": [{"step": 6, "loss": 1.0}, {"step": 8, "loss": 0.5}, "damaged", {"step": "9"}],
    }

    def test_every_step_number_is_converted(self, args: TrainingArguments) -> None:
        args.save_steps, args.logging_steps, args.eval_steps = 0.5, 2, None
        found = topology.convert_state(self.RECORD, planned(args), args)
        assert found == {
            **self.RECORD,
            "global_step": 3,
            "max_steps": 6,
            "save_steps": 3,
            "logging_steps": 2,
            "log_history": [{"step": 2, "loss": 1.0}, {"step": 2, "loss": 0.5}, "damaged", {"step": "9"}],
        }

    def test_the_batch_size_is_the_new_one(self, args: TrainingArguments) -> None:
        args.per_device_train_batch_size = 12
        args.gradient_accumulation_steps = 1
        assert topology.convert_state(self.RECORD, planned(args), args)["train_batch_size"] == 12


def test_a_warning_says_that_warmup_steps_are_new_steps(
    args: TrainingArguments, caplog: pytest.LogCaptureFixture
) -> None:
    args.warmup_steps = 5
    topology._log(planned(args), args)
    assert "warmup_steps=5 is counted in the new" in caplog.text
    args.warmup_steps = 0.1  # a share of all steps
    caplog.clear()
    topology._log(planned(args), args)
    assert "warmup" not in caplog.text


class TestDerivedRandomStates:
    def derived(self, folder: Path, args: TrainingArguments, **facts: Any) -> list[float]:
        """The first numbers that Trainer draws after it has set the state of a rank."""
        rank, size = facts.pop("rank", 0), facts.pop("size", 1)
        here = SimpleNamespace(**{"seed": args.seed, "world_size": size, **facts})
        folder.mkdir(exist_ok=True)
        topology.derive_states(folder, manifest(), here, [rank])  # type: ignore[arg-type]
        trainer = SimpleNamespace(
            args=SimpleNamespace(world_size=size, process_index=rank, parallel_mode=None)
        )
        Trainer._load_rng_state(trainer, str(folder))
        return [random.random(), numpy.random.random(), torch.rand(()).item()]

    def test_they_follow_from_seed_rank_and_step(self, tmp_path: Path, args: TrainingArguments) -> None:
        one = self.derived(tmp_path / "one", args)
        assert self.derived(tmp_path / "again", args) == one
        others = [
            self.derived(tmp_path / "seed", args, seed=7),
            self.derived(tmp_path / "ranks", args, size=2, rank=1),
            self.derived(tmp_path / "ranks", args, size=2, rank=2),
        ]
        numbers = [number for drawn in (one, *others) for number in drawn]
        assert len(set(numbers)) == len(numbers)

    def test_a_state_that_was_saved_stays(self, tmp_path: Path, args: TrainingArguments) -> None:
        topology.derive_states(tmp_path, manifest(SAVED, "rng_state.pth"), args, [0])
        assert list(tmp_path.glob("rng_state*")) == []


class TestLiveObjects:
    def live(self, **given: Any) -> dict[str, Any]:
        scheduler = LambdaLR(torch.optim.SGD([torch.zeros(1)], lr=1.0), lambda step: 1 - step / 6)
        scheduler.last_epoch = 9
        loader = DataLoader(range(24), batch_size=4)
        return {"lr_scheduler": scheduler, "train_dataloader": loader, **given}

    def state(self, step: int = 3, max_steps: int = 6) -> TrainerState:
        return TrainerState(global_step=step, max_steps=max_steps)

    def test_the_schedule_is_moved_to_the_position_of_the_data(self, args: TrainingArguments) -> None:
        live = self.live()
        topology.move_schedule(planned(args), self.state(), live)
        assert live["lr_scheduler"].get_last_lr() == [0.5]

    def test_steps_that_the_gradient_scaler_skipped_stay_skipped(self, args: TrainingArguments) -> None:
        live = self.live()
        live["lr_scheduler"].last_epoch = 6
        topology.move_schedule(planned(args), self.state(), live)
        assert live["lr_scheduler"].last_epoch == 2

    @pytest.mark.parametrize(
        ("given", "max_steps", "text"),
        [
            (
                {"lr_scheduler": StepLR(torch.optim.SGD([torch.zeros(1)], lr=1.0), 5)},
                6,
                "is a 'StepLR'",
            ),
            (
                {"train_dataloader": DataLoader(range(24), sampler=RandomSampler(range(24)), batch_size=4)},
                6,
                "order of a 'torch.RandomSampler'",
            ),
            ({}, 3, "6 steps were planned, but this Trainer ends at step 3"),
        ],
    )
    def test_a_schedule_order_or_length_that_does_not_fit_is_refused(
        self, args: TrainingArguments, given: dict[str, Any], max_steps: int, text: str
    ) -> None:
        with pytest.raises(PositionError, match=text):
            topology.move_schedule(planned(args), self.state(max_steps=max_steps), self.live(**given))

    def test_an_unknown_order_does_not_matter_between_two_epochs(self, args: TrainingArguments) -> None:
        between = replace(SAVED, global_step=12, samples_seen=48)
        loader = DataLoader(range(24), sampler=RandomSampler(range(24)), batch_size=4)
        live = self.live(train_dataloader=loader)
        topology.move_schedule(planned(args, between), self.state(4), live)

    def check(self, args: TrainingArguments, loader: Any, step: int = 3) -> None:
        topology.check(manifest(), args, self.state(step), EpochLength(loader))

    def test_the_live_loader_must_be_at_the_position_of_the_checkpoint(self, args: TrainingArguments) -> None:
        self.check(args, DataLoader(range(24), batch_size=4))
        with pytest.raises(
            PositionError, match="after 36 samples, but step 4 of this Trainer would continue after 48"
        ):
            self.check(args, DataLoader(range(24), batch_size=4), step=4)
        with pytest.raises(PositionError, match="step 3 of this Trainer would continue after 42"):
            self.check(args, DataLoader(range(24), batch_size=6))

    def test_with_ignore_data_skip_the_data_may_differ(self, args: TrainingArguments) -> None:
        args.ignore_data_skip = True
        self.check(args, DataLoader(range(20), batch_size=4))

    def test_the_next_save_is_in_new_steps(self, args: TrainingArguments) -> None:
        live = self.live()
        epoch = EpochLength(live["train_dataloader"])
        found = position(args, self.state(), epoch, live["lr_scheduler"])
        assert (found.samples_seen, found.epoch_steps, found.lr_scheduler) == (36, 2, "LambdaLR")
