"""Law 8 in a loop: resumed with different processes, batches or accumulation, each sample is seen once an epoch."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.errors import PositionError
from hf_cloudtrain.integrations.loop.loop import TrainLoop
from hf_cloudtrain.storage.client import Storage
from tests.integration._lab import Lab
from tests.integration._loop_attempts import attempt
from tests.integration._loops import Rows, forget_accelerate
from tests.integration.test_trainer_hosts import start_hosts

EPOCHS, SAMPLES = 3, 24
HALF = 32
"""Samples that every topology below divides into two equal halves."""

Topology = tuple[int, dict[str, Any]]
"""Processes, and the other settings that decide how many samples a step has."""
ONE: Topology = (1, {})
TWO: Topology = (2, {})
SEEDED = {"config": {"use_seedable_sampler": True}}
STATEFUL = {"config": {"use_stateful_dataloader": True}}
CHANGES: dict[str, tuple[Topology, Topology, int, int]] = {
    # old, new, the old step at epoch 1.5 of 3, the same position in new steps
    "doubled accumulation": ((1, {"batch_size": 2}), (1, {"batch_size": 2, "accumulation": 2}), 24, 12),
    "1 process instead of 2": (TWO, ONE, 6, 12),
    "2 processes instead of 1": (ONE, TWO, 12, 6),
    "other batches, accumulation and augmentation": (
        (1, {"batch_size": 16, "noise": True}),
        (1, {"batch_size": 4, "accumulation": 2, "noise": True, "workers": 1}),
        3,
        6,
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_law_8_every_sample_is_seen_once_an_epoch_and_the_schedule_ends_with_the_data_with(
    lab: Lab, change: str
) -> None:
    old, new, step, place = CHANGES[change]
    first = ran(lab, "first", old, save_steps=3, kill=step)
    second = ran(lab, "second", new, save_steps=1, kill=place + 1)  # converted, and then resumed as usual
    last = ran(lab, "last", new)
    seen = counted(first, until=step) + counted(second, until=place + 1) + counted(last)
    assert seen == {(epoch, number): 1 for epoch in range(EPOCHS) for number in range(HALF)}
    size, rest = new
    steps = EPOCHS * HALF // (size * rest.get("batch_size", 4) * rest.get("accumulation", 1))
    for rank in [*second, *last]:
        for at, rate in dict(zip((batch[0] for batch in rank["seen"]), rank["rates"], strict=True)).items():
            if rank in last or at <= place + 1:  # the killed one was within a step
                assert rate == pytest.approx(rate_at(size * at)), "Accelerate's schedules move once a process"
    assert [(rank["step"], rank["schedule"]) for rank in last] == [(steps, size * steps)] * size
    assert lab.manifest(1, step).position.epoch == 1.5
    assert (lab.machine("last") / "best/model.safetensors").exists()
    attempts = lab.catalog.attempts.read_all()
    assert [one.global_step for one in attempts] == [0, place, place + 1]
    assert str(attempts[1].resumed_from) == f"000001-{step:010d}"
    assert lab.problems() == []


def test_law_8_a_new_host_takes_its_position_from_the_first_one(lab: Lab) -> None:
    """Two hosts that share no disk: both download what process 0 has saved."""
    first = ran(lab, "first", ONE, save_steps=12, kill=12)
    second = ran(lab, "second", TWO, epochs=2, disks=True)
    seen = counted(first, until=12) + counted(second)
    assert seen == {(epoch, number): 1 for epoch in range(2) for number in range(HALF)}
    for rank in range(2):
        assert (lab.machine(f"second-{rank}") / "last/model.safetensors").exists() is (rank == 0)
    assert lab.problems() == []


class TestOneProcess:
    """In this process: nothing here depends on others."""

    def first(self, tmp_path: Path, *, kill: int = 4, **arguments: Any) -> list[Any]:
        found: list[Any] = self.go(tmp_path, "first", kill=kill, save_steps=2, **arguments)["seen"]
        return found

    def go(self, tmp_path: Path, machine: str, **arguments: Any) -> dict[str, Any]:
        return attempt(str(tmp_path / machine), run_url=str(tmp_path / "run"), **{"epochs": 2, **arguments})

    def test_law_8_between_two_epochs_any_topology_can_resume(self, tmp_path: Path) -> None:
        self.first(tmp_path, kill=6)  # of 6 an epoch, and the save that ends it
        catalog = Catalog(Storage(str(tmp_path / "run")))
        newest = catalog.newest()
        assert newest is not None
        assert catalog.read(newest).position.samples_seen == SAMPLES
        resumed = self.go(tmp_path, "second", accumulation=4)
        assert Counter(number for _, _, numbers in resumed["seen"] for number in numbers) == dict.fromkeys(
            range(SAMPLES), 1
        )
        assert (resumed["step"], resumed["schedule"]) == (4, 4)

    def test_law_8_the_local_folder_is_reused_under_its_new_number(self, tmp_path: Path) -> None:
        self.first(tmp_path, kill=4)
        found: list[Path] = []
        inodes: list[int] = []
        inode = (tmp_path / "first/checkpoint-4/model.safetensors").stat().st_ino

        def look(loop: TrainLoop) -> None:
            found.extend(filter(None, [loop.resume()]))
            inodes.append((found[0] / "model.safetensors").stat().st_ino)

        again = self.go(tmp_path, "first", accumulation=2, before=look)
        assert found == [tmp_path / "first/checkpoint-2.a1-4"]
        assert inodes == [inode], "it was not downloaded again"
        assert (again["step"], again["seen"][0][:2]) == (6, [3, 0])

    def test_law_8_a_stream_with_a_length_and_a_state_is_converted(self, tmp_path: Path) -> None:
        seen = self.first(tmp_path, data="stateful", epochs=1)
        resumed = self.go(tmp_path, "second", data="stateful", batch_size=8, epochs=1)
        numbers = [number for step, _, batch in seen for number in batch if step <= 4]
        numbers += [number for _, _, batch in resumed["seen"] for number in batch]
        assert numbers == list(range(SAMPLES))
        assert resumed["step"] == 3

    @pytest.mark.parametrize(
        ("old", "new", "text"),
        [
            (
                {},
                {"batch_size": 5},
                "saved after 16 samples, 16 of them in this epoch, which is not a multiple of the 5",
            ),
            ({"data": "stream"}, {"data": "stream", "accumulation": 2}, "The dataset is streamed"),
            (
                {"data": "counted"},
                {"data": "counted", "batch_size": 8},
                "dispatched in batches of the old size",
            ),
            (
                STATEFUL,
                {**STATEFUL, "batch_size": 8},
                "A stateful DataLoader keeps its position",
            ),
            ({}, {"samples": 32, "accumulation": 2}, "No prepared DataLoader has its 24 samples"),
            ({}, {"prepare": False, "accumulation": 2}, "No prepared DataLoader has its 24 samples"),
            ({}, {"prepare": False, "batch_size": 8}, "4 samples per batch and process before, 8 now"),
            ({"seed": 5, **SEEDED}, {"batch_size": 8}, "the sample order differs"),
        ],
        ids=str,
    )
    @pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata's
    def test_law_8_a_position_that_cannot_be_converted_is_refused(
        self, tmp_path: Path, old: dict[str, Any], new: dict[str, Any], text: str
    ) -> None:
        self.first(tmp_path, **old)
        with pytest.raises(PositionError, match=text):
            self.go(tmp_path, "second", **new)

    def test_law_8_a_different_dataset_between_two_epochs_causes_a_warning(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        self.go(tmp_path, "first", epochs=1)
        with caplog.at_level(logging.WARNING):
            self.go(tmp_path, "second", samples=32)
        assert (
            "checkpoint-6 was saved when the training dataset had 24 samples; it has 32 samples now"
            in caplog.text
        )

    def test_law_8_an_epoch_that_was_left_early_cannot_be_converted(self, tmp_path: Path) -> None:
        forget_accelerate()
        accelerator = Accelerator(cpu=True)
        batches = DataLoader(Rows(SAMPLES), batch_size=4)
        _, batches = accelerator.prepare(torch.nn.Linear(3, 1), batches)
        loop = TrainLoop(accelerator, str(tmp_path / "run"), num_epochs=1, output_dir=tmp_path / "first")
        for _ in loop.epochs():
            for _ in loop.steps(batches):
                if loop.global_step == 2:
                    break
        with pytest.raises(PositionError, match="Not every epoch was trained to its end"):
            self.go(tmp_path, "second", accumulation=2)


def ran(
    lab: Lab, machine: str, topology: Topology, *, disks: bool = False, **arguments: Any
) -> list[dict[str, Any]]:
    """What each rank has seen.

    Args:
        disks: each has one of its own.
    """
    size, rest = topology
    given = {
        "module": "tests.integration._loop_attempts",
        "epochs": EPOCHS,
        "samples": HALF,
        **rest,
        **arguments,
    }
    if size == 1:
        ranks = [lab.start(machine, "attempt", **given)]
    elif disks:
        ranks = start_hosts(lab, machine, "attempt", **given)
    else:
        ranks = lab.start_ranks(machine, "attempt", size=size, **given)
    assert [rank.wait() for rank in ranks] == [0] * size, "\n".join(rank.log for rank in ranks)
    return [rank.value for rank in ranks]


def rate_at(position: int) -> float:
    """The learning rate of `_loops.train` after so many steps of its schedule."""
    return 0.05 / (1 + position / 10)


def counted(ranks: list[dict[str, Any]], *, until: int = 10**9) -> Counter[tuple[int, int]]:
    """How often each (epoch, sample) was trained on."""
    return Counter(
        (epoch, number)
        for rank in ranks
        for step, epoch, numbers in rank["seen"]
        for number in numbers
        if step <= until
    )
