"""Loops with Accelerate."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from hf_cloudtrain import TrainLoop
from tests.corpus._attempt import SAVED, Attempt, setup

COUNT, BATCH = 48, 8


class Noisy(Dataset):
    """Adds noise to each sample."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = DATA[number]
        return x + 0.1 * torch.randn(4) + 0.1 * random.random(), y


class Stream(IterableDataset):
    """The same samples without a length; with `passes`, in another order each time."""

    def __init__(self, *, passes: bool = False) -> None:
        self.passes, self.number = passes, 0

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order = list(range(COUNT))
        if self.passes:
            random.Random(self.number).shuffle(order)
            self.number += 1
        for number in order:
            yield DATA[number]


X = torch.linspace(-1, 1, 4 * COUNT).reshape(COUNT, 4)
DATA = TensorDataset(X, (torch.arange(COUNT) % 3).float())


def net() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Linear(4, 16), torch.nn.Dropout(0.2), torch.nn.ReLU(), torch.nn.Linear(16, 1)
    )


def loss_of(model: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = ((model(x)[:, 0] - y) ** 2).mean()
    return loss


class Parts:
    """What most loops have."""

    def __init__(
        self,
        data: Any = DATA,
        *,
        accumulation: int = 1,
        config: dict[str, Any] | None = None,
        mixed_precision: str = "no",
        **loader: Any,
    ) -> None:
        self.accelerator: Any = Accelerator(
            cpu=True,
            gradient_accumulation_steps=accumulation,
            mixed_precision=mixed_precision,
            dataloader_config=DataLoaderConfiguration(**(config or {})),
        )
        self.model: Any = net()
        self.optimizer: Any = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.scheduler: Any = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: 1 / (1 + step / 5)
        )
        options = {"batch_size": BATCH, "shuffle": not isinstance(data, IterableDataset), **loader}
        self.batches: Any = DataLoader(data, **options)

    def prepare(self) -> Parts:
        self.model, self.optimizer, self.scheduler, self.batches = self.accelerator.prepare(
            self.model, self.optimizer, self.scheduler, self.batches
        )
        return self

    def step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        with self.accelerator.accumulate(self.model):
            self.accelerator.backward(loss_of(self.model, x, y))
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()

    def run(self, attempt: Attempt, **arguments: Any) -> None:
        """The loop of README."""
        loop = attempt.loop(self.accelerator, **arguments)
        for _ in loop.epochs():
            self.model.train()
            for x, y in loop.steps(self.batches):
                attempt.die_at(loop.global_step + 1)
                self.step(x, y)
        self.finish(attempt)

    def finish(self, attempt: Attempt, *more: torch.nn.Module) -> None:
        attempt.finish(self.accelerator.unwrap_model(self.model), *more)


LOOPS: dict[str, tuple[Callable[[], Parts], dict[str, Any], int]] = {
    "loop": (Parts, {}, SAVED),
    "loop, resumed from an epoch's end": (Parts, {"save_steps": None}, 6),
    "loop with a shuffle by a generator": (
        lambda: Parts(generator=torch.Generator().manual_seed(3)),
        {},
        SAVED,
    ),
    "loop with accelerator.accumulate": (lambda: Parts(accumulation=2, batch_size=4), {}, SAVED),
    "loop with accelerator.accumulate and a short last step": (
        lambda: Parts(accumulation=4, batch_size=8),
        {"save_steps": 1},
        3,
    ),
    "loop in bf16": (lambda: Parts(mixed_precision="bf16"), {}, SAVED),
    "loop with a seedable sampler": (lambda: Parts(config={"use_seedable_sampler": True}), {}, SAVED),
    "loop with augmentation": (lambda: Parts(Noisy()), {}, SAVED),
    "loop with two loader processes": (lambda: Parts(num_workers=2), {}, SAVED),
    "loop with persistent loader processes": (
        lambda: Parts(num_workers=1, persistent_workers=True),
        {"num_epochs": 3},
        SAVED,
    ),
    "loop with augmentation in two loader processes": (lambda: Parts(Noisy(), num_workers=2), {}, SAVED),
    "loop with a stateful loader": (lambda: Parts(config={"use_stateful_dataloader": True}), {}, SAVED),
    "loop over a stream, in its second pass": (lambda: Parts(Stream()), {}, SAVED),
    "loop over a stream that counts its passes, in its second pass": (
        lambda: Parts(Stream(passes=True)),
        {},
        SAVED,
    ),
}


def with_parts(parts: Callable[[], Parts], arguments: dict[str, Any]) -> Callable[[Attempt], None]:
    return lambda attempt: parts().prepare().run(attempt, **arguments)


for _name, (_parts, _arguments, _saved) in LOOPS.items():
    setup(_name, saved=_saved)(with_parts(_parts, _arguments))


@setup("loop with a stateful loader and a prepared loader for evaluation")
def stateful_evaluation(attempt: Attempt) -> None:
    parts = Parts(config={"use_stateful_dataloader": True}).prepare()
    evaluation = parts.accelerator.prepare(DataLoader(DATA, batch_size=16))
    loop = attempt.loop(parts.accelerator, num_epochs=3)
    for _ in loop.epochs():
        parts.model.train()
        for x, y in loop.steps(parts.batches):
            attempt.die_at(loop.global_step + 1)
            parts.step(x, y)
        parts.model.eval()
        with torch.no_grad():
            losses = [float(loss_of(parts.model, x, y)) for x, y in loop.eval_batches(evaluation)]
        loop.end_epoch({"loss": sum(losses) / len(losses)})
    parts.finish(attempt)


def manual(
    attempt: Attempt, batches: Callable[[TrainLoop, Any], Any], is_step: Callable[[int], bool]
) -> None:
    """Gradient accumulation by hand: each step of the optimizer is of two batches."""
    parts = Parts(batch_size=4).prepare()
    loop = attempt.loop(parts.accelerator)
    for _ in loop.epochs():
        parts.model.train()
        for number, (x, y) in batches(loop, parts.batches):
            attempt.die_at(loop.global_step + 1)
            parts.accelerator.backward(loss_of(parts.model, x, y) / 2)
            if is_step(number):
                parts.optimizer.step()
                parts.scheduler.step()
                parts.optimizer.zero_grad()
    parts.finish(attempt)


def counted(loop: TrainLoop, batches: Any) -> Any:
    """The loop's own number of each batch."""
    for batch in loop.steps(batches):
        yield loop.batch_index, batch


@setup("loop with accumulation by hand at 0, 2, 4 of enumerate")
def by_enumerate(attempt: Attempt) -> None:
    manual(attempt, lambda loop, batches: enumerate(loop.steps(batches)), lambda number: number % 2 == 0)


@setup("loop with accumulation by hand at 1, 3, 5 of enumerate")
def by_enumerate_from_one(attempt: Attempt) -> None:
    manual(attempt, lambda loop, batches: enumerate(loop.steps(batches)), lambda number: number % 2 == 1)


@setup("loop with accumulation by hand and the loop's number of the batch")
def by_the_loop(attempt: Attempt) -> None:
    manual(attempt, counted, lambda number: number % 2 == 1)


class Mean:
    """An EMA of a model's weights."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = copy.deepcopy(model)

    def update(self, model: torch.nn.Module) -> None:
        for mean, value in zip(self.model.parameters(), model.parameters(), strict=True):
            mean.data.lerp_(value.detach(), 0.1)

    def state_dict(self) -> dict[str, Any]:
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state)


def with_mean(attempt: Attempt, *, registered: bool) -> None:
    parts = Parts().prepare()
    ema = Mean(parts.accelerator.unwrap_model(parts.model))
    if registered:
        parts.accelerator.register_for_checkpointing(ema)
    loop = attempt.loop(parts.accelerator)
    for _ in loop.epochs():
        parts.model.train()
        for x, y in loop.steps(parts.batches):
            attempt.die_at(loop.global_step + 1)
            parts.step(x, y)
            ema.update(parts.accelerator.unwrap_model(parts.model))
    parts.finish(attempt, ema.model)


@setup("loop with a mean of the weights in a variable")
def mean_in_a_variable(attempt: Attempt) -> None:
    with_mean(attempt, registered=False)


@setup("loop with a mean of the weights that is registered")
def mean_registered(attempt: Attempt) -> None:
    with_mean(attempt, registered=True)


@setup("loop with an optimizer that is not prepared")
def optimizer_not_prepared(attempt: Attempt) -> None:
    parts = Parts()
    parts.model, parts.batches = parts.accelerator.prepare(parts.model, parts.batches)
    parts.run(attempt)


@setup("loop with a schedule that is not prepared")
def schedule_not_prepared(attempt: Attempt) -> None:
    parts = Parts()
    parts.model, parts.optimizer, parts.batches = parts.accelerator.prepare(
        parts.model, parts.optimizer, parts.batches
    )
    parts.run(attempt)


@setup("loop with two models and two optimizers")
def two_models(attempt: Attempt) -> None:
    parts = Parts().prepare()
    other: Any = net()
    its_optimizer: Any = torch.optim.SGD(other.parameters(), lr=1e-2, momentum=0.9)
    other, its_optimizer = parts.accelerator.prepare(other, its_optimizer)
    loop = attempt.loop(parts.accelerator)
    for _ in loop.epochs():
        for x, y in loop.steps(parts.batches):
            attempt.die_at(loop.global_step + 1)
            parts.accelerator.backward(loss_of(other, x, y) + parts.model(x).detach().square().mean())
            its_optimizer.step()
            its_optimizer.zero_grad()
            parts.step(x, y)
    parts.finish(attempt, parts.accelerator.unwrap_model(other))


@setup("loop with a counter in a variable that anneals a term of the loss")
def counter(attempt: Attempt) -> None:
    parts = Parts().prepare()
    loop = attempt.loop(parts.accelerator)
    calls = 0
    for _ in loop.epochs():
        for x, y in loop.steps(parts.batches):
            attempt.die_at(loop.global_step + 1)
            calls += 1
            loss = loss_of(parts.model, x, y) + min(1.0, calls / 20) * parts.model(x).square().mean()
            parts.accelerator.backward(loss)
            parts.optimizer.step()
            parts.scheduler.step()
            parts.optimizer.zero_grad()
    parts.finish(attempt)


@setup("loop that sums its losses for a printout")
def total(attempt: Attempt) -> None:
    parts = Parts().prepare()
    loop = attempt.loop(parts.accelerator)
    for _ in loop.epochs():
        total_loss = 0.0
        for number, (x, y) in enumerate(loop.steps(parts.batches)):
            attempt.die_at(loop.global_step + 1)
            total_loss += float(loss_of(parts.model, x, y).detach())
            assert number >= 0
            parts.step(x, y)
        loop.end_epoch({"loss": total_loss})
    parts.finish(attempt)
