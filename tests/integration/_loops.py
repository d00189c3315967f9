"""A loop small enough for a test that draws random numbers wherever training may: in its data, its model and its loss."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, WeightedRandomSampler

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.integrations.loop.loop import TrainLoop
from hf_cloudtrain.preemption import agreement
from hf_cloudtrain.storage.client import Storage

EPOCHS = 2
agreement.INTERVAL_SECONDS = (
    0.0  # vote after each step, although steps take milliseconds, so that the deciding step is known
)


class KilledError(Exception):
    """Training ends here, as if the machine had crashed: everything in memory is lost."""


class Rows(Dataset):
    """`size` samples; with `noise`, fetching one draws from torch's, Python's and numpy's global states."""

    def __init__(self, size: int, *, noise: bool = False) -> None:
        self.size = size
        self.noise = noise

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        x = torch.tensor([index / self.size, (index * 7 % self.size) / self.size, 1.0])
        if self.noise:
            x = x + 0.1 * (torch.rand(3) + random.random() + float(np.random.rand()))
        return {"x": x, "id": torch.tensor(index)}


class Stream(IterableDataset):
    """The same as a stream without a state."""

    def __init__(self, size: int, *, noise: bool = False) -> None:
        self.rows = Rows(size, noise=noise)
        self.at = self.begin_at = 0

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        self.at, self.begin_at = self.begin_at, 0
        while self.at < len(self.rows):
            self.at += 1
            yield self.rows[self.at - 1]


class StatefulStream(Stream):
    """The same as a stream with a state."""

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.begin_at = state["at"]


def hub_stream(size: int, *, shuffled: bool = False) -> Any:
    """A stream of `datasets`, whose state does not hold the content of a shuffle buffer."""
    from datasets import Dataset as HubDataset

    rows = [Rows(size)[index] for index in range(size)]
    columns = {"x": [row["x"].tolist() for row in rows], "id": list(range(size))}
    stream = HubDataset.from_dict(columns).to_iterable_dataset(num_shards=3).with_format("torch")
    return stream.shuffle(seed=2, buffer_size=8) if shuffled else stream


# Per case: the dataset, and what is unusual about the loop. Every attempt creates its own datasets and generators.
CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "shuffling": (lambda: Rows(20), {}),
    "data that draws random numbers": (lambda: Rows(20, noise=True), {}),
    "a short last batch": (lambda: Rows(18, noise=True), {}),
    "accumulation": (lambda: Rows(34, noise=True), {"accumulation": 2, "save_steps": 2, "kills": (4, 7)}),
    "bf16": (lambda: Rows(20), {"mixed_precision": "bf16"}),
    "a seedable sampler": (lambda: Rows(20), {"config": {"use_seedable_sampler": True}}),
    "a generator": (lambda: Rows(20), {"loader": lambda: {"generator": torch.Generator().manual_seed(3)}}),
    "weights": (
        lambda: Rows(20),
        {"loader": lambda: {"shuffle": False, "sampler": WeightedRandomSampler([1.0] * 20, 20)}},
    ),
    "replacement": (
        lambda: Rows(70),
        {
            "loader": lambda: {
                "shuffle": False,
                "sampler": RandomSampler(Rows(70), replacement=True, num_samples=70),
            }
        },
    ),
    "loader processes": (lambda: Rows(20), {"workers": 2}),
    "lasting loader processes": (
        lambda: Rows(20),
        {"workers": 2, "loader": lambda: {"persistent_workers": True}},
    ),
    "a loader that is not prepared": (lambda: Rows(20, noise=True), {"prepare": False}),
    "a stateful loader": (lambda: Rows(20, noise=True), {"config": {"use_stateful_dataloader": True}}),
    "a stateful loader with processes": (
        lambda: Rows(20),
        {"config": {"use_stateful_dataloader": True}, "workers": 2},
    ),
    "a dispatched loader": (lambda: Rows(20, noise=True), {"config": {"dispatch_batches": True}}),
    "a stream": (lambda: Stream(20, noise=True), {}),
    "a stream with a state": (lambda: StatefulStream(20, noise=True), {}),
    "a stream in a stateful loader": (
        lambda: StatefulStream(20),
        {"config": {"use_stateful_dataloader": True}},
    ),
    "a stream in a loader process": (lambda: Stream(20), {"workers": 1}),
    "a stream of the hub": (lambda: hub_stream(20), {}),
    "a shuffled stream of the hub": (lambda: hub_stream(20, shuffled=True), {}),
}
OF_TWO = {
    "data that draws random numbers": (lambda: Rows(27, noise=True), {}),
    "accumulation": (lambda: Rows(67, noise=True), {"accumulation": 2, "save_steps": 2, "kills": (4, 7)}),
    "a seedable sampler": (lambda: Rows(27), {"config": {"use_seedable_sampler": True}}),
    "loader processes": (lambda: Rows(27), {"workers": 2}),
    "split batches": (lambda: Rows(27), {"config": {"split_batches": True}}),
    "a dispatched loader": (lambda: Rows(27), {"config": {"dispatch_batches": True}}),
    "a dispatched stream with a state": (lambda: StatefulStream(32, noise=True), {}),
    "a stream that each reads": (
        lambda: StatefulStream(27, noise=True),
        {"config": {"dispatch_batches": False}},
    ),
    "a stateful loader": (lambda: Rows(27, noise=True), {"config": {"use_stateful_dataloader": True}}),
}


def forget_accelerate() -> None:
    """As in a new process."""
    for shared in (AcceleratorState, GradientState, PartialState):
        shared._reset_state()


def train(
    run_url: Path | str,
    output_dir: Path,
    dataset: Any,
    *,
    kill: int | None = None,
    signal_at: int | None = None,
    seen: list[Any] | None = None,
    epochs: int = EPOCHS,
    save_steps: int | None = 2,
    accumulation: int = 1,
    batch_size: int = 4,
    workers: int = 0,
    config: dict[str, Any] | None = None,
    loader: Callable[[], dict[str, Any]] = dict,
    mixed_precision: str = "no",
    prepare: bool = True,
    seed: int = 1,
    inside: Callable[[TrainLoop], None] = lambda loop: None,
    prepared: Callable[[Accelerator], None] = lambda accelerator: None,
    before: Callable[[TrainLoop], object] = lambda loop: None,
    log_with: Any = None,
    project_dir: Path | None = None,
    plugin: Any = None,
    **arguments: Any,
) -> tuple[dict[str, torch.Tensor], list[Any], TrainLoop]:
    """One attempt: (weights at its end, [step it belongs to, epoch, sample ids] of each batch, the loop).

    Args:
        kill: ends within the step after this one, when all that was saved is committed.
        signal_at: SIGTERM to the last rank within the step after this one.
        seen: takes the batches as they come.
        inside: called in the body of each batch.
        prepared: called when everything is prepared.
        before: called before the first epoch.
    """
    forget_accelerate()
    set_seed(seed)
    accelerator = Accelerator(
        cpu=True,
        **(
            {"gradient_accumulation_plugin": plugin}
            if plugin
            else {"gradient_accumulation_steps": accumulation}
        ),
        mixed_precision=mixed_precision,
        dataloader_config=DataLoaderConfiguration(**(config or {})),
        log_with=log_with,
        project_dir=project_dir,
    )
    model: Any = torch.nn.Sequential(
        torch.nn.Linear(3, 16), torch.nn.Dropout(0.3), torch.nn.ReLU(), torch.nn.Linear(16, 1)
    )
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.05)
    scheduler: Any = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / 10))
    options = {"shuffle": not isinstance(dataset, IterableDataset), **loader()}
    if "batch_sampler" in options:
        options.pop("shuffle")
    batches: Any = DataLoader(dataset, batch_size=batch_size, num_workers=workers, **options)
    if prepare:
        batches = accelerator.prepare(batches)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    prepared(accelerator)
    arguments = {"metric_for_best_model": "loss", "logging_steps": 2, **arguments}
    loop = TrainLoop(
        accelerator,
        str(run_url),
        num_epochs=epochs,
        save_steps=save_steps,
        output_dir=output_dir,
        **arguments,
    )
    before(loop)
    seen = [] if seen is None else seen
    for epoch in loop.epochs():
        model.train()
        for batch in loop.steps(batches):
            with accelerator.accumulate(model):
                answer = model(batch["x"])
                wanted = (
                    batch["x"].sum(1, keepdim=True) + 0.1 * random.random() + 0.1 * float(np.random.rand())
                )
                loss = ((answer - wanted) ** 2).mean()
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            loop.log(loss=loss)
            seen.append([loop.global_step + 1, epoch, batch["id"].tolist()])
            inside(loop)
            if loop.global_step == signal_at and accelerator.is_last_process:
                os.kill(os.getpid(), signal.SIGTERM)
            if kill is not None and loop.global_step == kill:
                loop._checkpointer.wait()
                raise KilledError(seen)
        loop.end_epoch({"loss": evaluate(model, loop)})
    weights = {name: value.clone() for name, value in accelerator.unwrap_model(model).state_dict().items()}
    return weights, seen, loop


def evaluate(model: Any, loop: TrainLoop) -> float:
    """The loss on a few rows. It draws random numbers, too."""
    model.eval()
    total = float(torch.rand(1))
    with torch.no_grad():
        for batch in loop.eval_batches(DataLoader(Rows(8), batch_size=4)):
            total += float(((model(batch["x"]) - batch["x"].sum(1, keepdim=True)) ** 2).mean())
    return total


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest difference of two models' weights."""
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def through_kills(
    folder: Path, dataset: Callable[[], Any], *, kills: tuple[int, ...] = (3, 7), **arguments: Any
) -> dict[str, Any]:
    """Train without a stop, and the same through kills, each followed by an empty machine with a different seed; compare."""
    weights, whole, _ = train(folder / "plain", folder / "uninterrupted", dataset(), **arguments)
    run = folder / "run"
    seen: list[Any] = []
    for number, kill in enumerate(kills):
        try:
            own = {"seed": 1 + number, **arguments}
            train(run, folder / f"machine-{number}", dataset(), kill=kill, **own)
        except KilledError as killed:
            newest = Catalog(Storage(str(run))).newest()
            seen += [item for item in killed.args[0] if newest is not None and item[0] <= newest.step]
    resumed, rest, loop = train(run, folder / "last-machine", dataset(), **{"seed": 9, **arguments})
    return {
        "difference": difference(weights, resumed),
        "batches": [item[1:] for item in seen + rest],
        "uninterrupted": [item[1:] for item in whole],
        "attempts": Catalog(Storage(str(run))).attempts.numbers(),
        "position": _newest_position(run),
        "resumed_at": rest[0][0] - 1,
        "steps": loop.global_step,
    }


def through_a_signal(
    folder: Path, dataset: Callable[[], Any], *, signal_at: int, seed: int = 1, **arguments: Any
) -> dict[str, Any]:
    """The same through SIGTERM to one rank: which step was saved, and whether an empty machine continues as if uninterrupted."""
    weights, whole, _ = train(folder / "plain", folder / "uninterrupted", dataset(), seed=seed, **arguments)
    run = folder / "run"
    seen: list[Any] = []
    exit_code = None
    try:
        train(run, folder / "machine", dataset(), signal_at=signal_at, seen=seen, seed=seed, **arguments)
    except SystemExit as left:
        exit_code = left.code
    newest = Catalog(Storage(str(run))).newest()
    resumed, rest, _ = train(run, folder / "last-machine", dataset(), **{**arguments, "seed": 9})
    return {
        "exit_code": exit_code,
        "saved": None if newest is None else newest.step,
        "difference": difference(weights, resumed),
        "batches": [item[1:] for item in seen + rest],
        "uninterrupted": [item[1:] for item in whole],
    }


def _newest_position(run: Path) -> dict[str, Any]:
    catalog = Catalog(Storage(str(run)))
    newest = catalog.newest()
    assert newest is not None
    return dataclasses.asdict(catalog.read(newest).position)


def failing_save(folder: Path, failing_rank: int) -> str:
    """The error on this rank when the disk of one of them is full."""
    real = Accelerator.save_state

    def fail(self: Accelerator, output_dir: str, **options: Any) -> Any:
        if self.process_index == failing_rank:
            raise OSError(28, "No space left on device")
        return real(self, output_dir, **options)

    Accelerator.save_state = fail
    try:
        train(folder / "run", folder / "out", Rows(27))
    except Exception as error:  # noqa: BLE001 - the parent looks at it
        return f"{type(error).__name__}: {error}"
    finally:
        Accelerator.save_state = real
    return "nothing"


def main(folder: str) -> None:
    """Every case of two processes, each written as JSON by its rank."""
    results: dict[str, Any] = {}
    for rank in range(2):
        results[f"rank {rank} cannot save"] = failing_save(Path(folder) / f"full-{rank}", rank)
    for number, (name, (dataset, arguments)) in enumerate(OF_TWO.items()):
        results[name] = through_kills(Path(folder) / str(number), dataset, **arguments)
        PartialState().wait_for_everyone()
    signalled = through_a_signal(
        Path(folder) / "signal", lambda: Rows(67, noise=True), signal_at=2, accumulation=2
    )
    rank = torch.distributed.get_rank()
    Path(folder, f"results-{rank}.json").write_text(json.dumps({"cases": results, "signalled": signalled}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
