"""Law 8 with the real Trainer: resumed with different processes or accumulation, each sample is seen once an epoch."""

from __future__ import annotations

import json
import signal
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from tests.integration._lab import Lab
from tests.integration._zygote import Child
from tests.integration.test_trainer_hosts import start_hosts
from tests.integration.test_trainer_ranks import finish

EPOCHS, SAMPLES = 3, 24
HALF = 32
"""Samples that every topology below divides into two equal halves."""
COMMON: dict[str, Any] = {"num_train_epochs": EPOCHS, "samples": SAMPLES, "save_steps": 1}

Topology = tuple[int, dict[str, Any]]
"""Processes, and the other settings that decide how many samples a step has."""
ONE: Topology = (1, {"per_device_train_batch_size": 4})
TWO: Topology = (2, {"per_device_train_batch_size": 4})
CHANGES: dict[str, tuple[Topology, Topology, int, int]] = {
    # old, new, the old step at epoch 1.5 of 3, the same position in new steps
    "doubled accumulation": (
        (1, {"per_device_train_batch_size": 2}),
        (1, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
        24,
        12,
    ),
    "1 process instead of 2": (TWO, ONE, 6, 12),
    "2 processes instead of 1": (ONE, TWO, 12, 6),
    "1 process instead of 2 that split batches": (
        (2, {"per_device_train_batch_size": 8, "accelerator_config": {"split_batches": True}}),
        (1, {"per_device_train_batch_size": 4}),
        6,
        12,
    ),
    "1 process with as much in a step": (TWO, (1, {"per_device_train_batch_size": 8}), 6, 6),
}


@pytest.mark.parametrize("change", CHANGES)
def test_law_8_every_sample_is_seen_once_an_epoch_and_the_schedule_ends_with_the_data_with(
    lab: Lab, change: str
) -> None:
    old, new, step, converted = CHANGES[change]
    killed(lab, "first", old, kill_at=step + 1, committed=step, samples=HALF)
    plain = trained(lab, "plain", new, samples=HALF, run_url=None)
    resumed = trained(lab, "second", new, samples=HALF)
    assert lab.manifest(1, step).position.epoch == 1.5
    seen = samples_of(lab, "first", old[0], until=step) + samples_of(lab, "second", new[0], after=converted)
    assert seen == samples_of(lab, "plain", new[0])
    assert Counter(seen) == dict.fromkeys(range(HALF), EPOCHS)
    assert resumed["step"] == plain["step"]
    rates = [record["learning_rate"] for record in plain["log"]]
    assert [record["learning_rate"] for record in resumed["log"] if record["step"] > converted] == rates[
        converted:
    ]
    epochs = [record["epoch"] for record in plain["log"]]
    assert [record["epoch"] for record in resumed["log"] if record["step"] > converted] == epochs[converted:]
    attempt = lab.catalog.attempts.read_all()[-1]
    assert (attempt.global_step, str(attempt.resumed_from)) == (converted, f"000001-{step:010d}")
    assert lab.keys()[-1] == f"000002-{plain['step']:010d}"
    assert lab.problems() == []


def test_law_8_new_hosts_get_the_position_and_random_states_of_their_own(lab: Lab) -> None:
    killed(lab, "first", ONE, kill_at=9, committed=8)
    finish(start_hosts(lab, "second", **COMMON, **TWO[1]))
    seen = samples_of(lab, "first", 1, until=8) + samples_of(lab, "second", 2)
    assert Counter(seen) == dict.fromkeys(range(SAMPLES), EPOCHS)
    for rank in range(2):
        restored = lab.machine(f"second-{rank}") / "checkpoint-4.a1-8"
        assert [path.name for path in restored.glob("rng_state_*")] == [f"rng_state_{rank}.pth"]
    assert lab.problems() == []


def test_law_8_the_log_says_what_changed_and_what_is_not_exact(lab: Lab) -> None:
    killed(lab, "first", TWO, kill_at=5, committed=4)
    second = start(lab, "second", ONE)[0]
    assert second.wait() == 0, second.log
    assert (
        "checkpoint-4: 2 processes before, 1 now. Step 4 under the old settings is step 8 under the new ones (32 samples seen)"
        in (second.log)
    )
    assert (
        "will not equal an uninterrupted one: random numbers are drawn for different batches, and"
        in second.log
    )


def test_law_8_a_position_is_converted_once_however_often_it_is_restored(lab: Lab) -> None:
    """On the machine that saved it, whose folders have old numbers; and back again."""
    killed(lab, "first", ONE, kill_at=9, committed=8)
    doubled = (1, {"per_device_train_batch_size": 8})
    for _ in range(2):
        killed(lab, "first", doubled, kill_at=5, save_steps=100)
    folders = {path.name for path in lab.machine("first").glob("checkpoint-*")}
    assert folders == {f"checkpoint-{step}" for step in range(1, 5)} | {"checkpoint-4.a1-8"}
    state = json.loads((lab.machine("first") / "checkpoint-4.a1-8/trainer_state.json").read_text())
    assert [record["step"] for record in state["log_history"]] == [0, 1, 1, 2, 2, 3, 3, 4]
    Path(f"{lab.folder}/first-0.seen").unlink()
    back = trained(lab, "first", ONE)
    assert back["restored"] == str(lab.machine("first") / "checkpoint-8")
    assert samples_of(lab, "first", 1) == samples_of_plain(lab, ONE)[32:]
    assert [attempt.global_step for attempt in lab.catalog.attempts.read_all()] == [0, 4, 4, 8]


def test_law_8_the_best_checkpoint_stays_the_best_when_steps_are_renumbered(lab: Lab) -> None:
    best = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "nearness",  # best after 6 steps, of any size
        "greater_is_better": True,
        "save_total_limit": 2,
    }
    killed(lab, "first", ONE, kill_at=9, committed=8, **best)
    doubled = (1, {"per_device_train_batch_size": 8})
    killed(lab, "second", doubled, kill_at=7, committed=6, **best)
    last = trained(lab, "third", doubled, **best)
    assert last["best"] == str(lab.machine("third") / "checkpoint-3.a1-6")
    assert not lab.manifest(2, 6).metrics.get("best_metric")
    loaded, saved = (
        load_file(lab.folder / "third.safetensors"),
        load_file(lab.folder / "run/checkpoint-6/model.safetensors"),
    )
    assert all((loaded[name] == saved[name]).all() for name in saved)


def test_law_8_a_dispatched_loader_is_refused_within_an_epoch_and_the_advice_works(lab: Lab) -> None:
    """On the same topology: Accelerate would continue in the order of a different epoch, and finish."""
    dispatched = {"accelerator_config": {"dispatch_batches": True}}
    killed(lab, "first", ONE, kill_at=9, committed=8, **dispatched)
    assert "accelerator_config={'dispatch_batches': False}" in failed(lab, "second", ONE, **dispatched)
    trained(lab, "second", ONE)
    seen = samples_of(lab, "first", 1, until=8) + samples_of(lab, "second", 1)
    assert Counter(seen) == dict.fromkeys(range(SAMPLES), EPOCHS)


def test_law_8_an_order_that_is_in_no_checkpoint_is_recorded_as_inexact(lab: Lab) -> None:
    """In the first epoch the same order is drawn again, from the seed of the script."""
    killed(lab, "first", ONE, kill_at=9, committed=8, accelerator_config={"use_seedable_sampler": False})
    assert [lab.manifest(1, step).exact for step in range(1, 9)] == [True] * 6 + [False] * 2
    second = start(lab, "second", ONE, accelerator_config={"use_seedable_sampler": False})[0]
    assert second.wait() == 0, second.log
    assert "will not equal an uninterrupted run: the order of the data is drawn from the random states" in (
        second.log
    )


class TestWhatCannotBeConvertedIsRefused:
    def test_law_8_max_steps_must_be_given_in_new_steps(self, lab: Lab) -> None:
        killed(lab, "first", ONE, kill_at=9, committed=8, max_steps=16)
        output = failed(lab, "second", TWO, max_steps=16)
        assert "max_steps=16 is counted in the new (differently sized) steps" in output
        assert "pass max_steps=8" in output
        assert trained(lab, "third", TWO, max_steps=8)["step"] == 8
        assert len(samples_of(lab, "third", 2)) == 8 * (16 - 8) // 2

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            ({"samples": 22}, "the training dataset had 24 samples; it has 22 samples now"),
            ({"seed": 43}, "in the order of seed 42, but this Trainer uses seed 43"),
            (
                {"dataloader_drop_last": True, "per_device_train_batch_size": 5},
                "not a multiple of the 5 samples",
            ),
            (
                {"train_sampling_strategy": "group_by_length", "gradient_accumulation_steps": 2},
                "orders the data by the batch size",
            ),
            ({"stream": True, "max_steps": 18}, "the training dataset had 24 samples; it is streamed now"),
        ],
        ids=str,
    )
    def test_law_8_a_different_dataset_or_order(self, lab: Lab, change: dict[str, Any], text: str) -> None:
        killed(lab, "first", ONE, kill_at=9, committed=8)
        assert text in failed(lab, "second", (1, {**ONE[1], **change}))
        assert lab.catalog.attempts.numbers() == [1]

    def test_law_8_a_stream_has_no_position_to_convert(self, lab: Lab) -> None:
        killed(lab, "first", ONE, kill_at=9, committed=8, stream=True, max_steps=18)
        output = failed(lab, "second", TWO, stream=True, max_steps=9)
        assert "1 processes before, 2 now. The dataset is streamed" in output


def start(lab: Lab, machine: str, topology: Topology, **arguments: Any) -> list[Child]:
    size, rest = topology
    given = {**COMMON, **rest, **arguments}
    return [lab.start(machine, **given)] if size == 1 else lab.start_ranks(machine, size=size, **given)


def trained(lab: Lab, machine: str, topology: Topology, **arguments: Any) -> dict[str, Any]:
    ranks = start(lab, machine, topology, **arguments)
    assert [rank.wait() for rank in ranks] == [0] * len(ranks), "\n".join(rank.log for rank in ranks)
    value: dict[str, Any] = ranks[0].value
    return value


def killed(lab: Lab, machine: str, topology: Topology, *, kill_at: int, **arguments: Any) -> None:
    ranks = start(lab, machine, topology, kill_at=kill_at, **arguments)
    codes = [rank.wait() for rank in ranks]
    assert codes == [-signal.SIGKILL] * len(ranks), "\n".join(rank.log for rank in ranks)


def failed(lab: Lab, machine: str, topology: Topology, **arguments: Any) -> str:
    ranks = start(lab, machine, topology, **arguments)
    assert [rank.wait() for rank in ranks] == [1] * len(ranks), "\n".join(rank.log for rank in ranks)
    assert all("PositionError: checkpoint-8 " in rank.log for rank in ranks), ranks[0].log
    return ranks[0].log


def samples_of(lab: Lab, machine: str, size: int, *, after: int = 0, until: int = 10**9) -> list[int]:
    """The samples that the models of a machine saw, in the order of the data: the ranks take turns, batch by batch."""
    ranks = [lab.batches(machine, rank=rank, after=after, until=until) for rank in range(size)]
    batches = chain.from_iterable(zip(*ranks, strict=True))
    return [number for _, numbers in batches for number in numbers]


def samples_of_plain(lab: Lab, topology: Topology) -> list[int]:
    trained(lab, "plain", topology, run_url=None)
    return samples_of(lab, "plain", topology[0])
