"""Scripts with Trainer whose state hides: in loader processes, helper functions, hooks, optimizers, the order of epochs."""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset
from transformers import Trainer, TrainerCallback

from tests.corpus import _models as models
from tests.corpus._attempt import SAVED, Attempt, setup
from tests.corpus._trainers import Stream
from tests.corpus._unsure import (
    Curriculum,
    DrawingStream,
    ModuleGenerator,
    OwnGenerator,
    Plain,
    on_images,
    with_callback,
)

CHANCE = np.random.default_rng(5)
NOISE = torch.Generator().manual_seed(5)
TWO: dict[str, Any] = {"dataloader_num_workers": 2}
BY_LENGTH: dict[str, Any] = {"train_sampling_strategy": "batch_rebalance"}


class Scaled(Plain):
    """Multiplies each image by a number."""

    def __init__(self, factor: Callable[[int], float]) -> None:
        super().__init__()
        self.factor = factor

    def __getitem__(self, number: int) -> dict[str, Any]:
        sample = super().__getitem__(number)
        return {**sample, "pixel_values": sample["pixel_values"] * self.factor(number)}


def by_chance(number: int) -> float:
    return float(CHANCE.uniform(0.5, 1.5))


def by_a_helper(number: int) -> float:
    return by_chance(number)


class Shift:
    """Draws from a generator of its own."""

    def __init__(self) -> None:
        self.chance = random.Random(5)

    def __call__(self, number: int) -> float:
        return self.chance.uniform(0.5, 1.5)


SHIFT = Shift()


def by_an_object(number: int) -> float:
    return SHIFT(number)


def by_the_sample(number: int) -> float:
    random.seed(number)
    return random.random()


class Cycle(Plain):
    """Holds an iterator."""

    def __init__(self) -> None:
        super().__init__()
        self.factors = itertools.cycle([0.5, 0.7, 1.0, 1.3, 1.9])

    def __getitem__(self, number: int) -> dict[str, Any]:
        sample = super().__getitem__(number)
        return {**sample, "pixel_values": sample["pixel_values"] * next(self.factors)}


IMAGES: dict[str, tuple[Callable[[], Any], dict[str, Any], int]] = {
    "augmentation by a generator of the dataset's own in two loader processes": (OwnGenerator, TWO, SAVED),
    "augmentation by a generator of the dataset's own in two loader processes, resumed from an epoch's last step": (
        OwnGenerator,
        {"save_steps": 6, **TWO},
        6,
    ),
    "a dataset that counts its reads in two loader processes": (Curriculum, TWO, SAVED),
    "augmentation by a helper function": (lambda: Scaled(by_a_helper), {}, SAVED),
    "augmentation by an object of the module": (lambda: Scaled(by_an_object), {}, SAVED),
    "augmentation of a part of a dataset": (lambda: Subset(ModuleGenerator(), range(48)), {}, SAVED),
    "augmentation by an iterator": (Cycle, {}, SAVED),
    "augmentation that seeds Python's random by the sample": (lambda: Scaled(by_the_sample), {}, SAVED),
    "augmentation that seeds Python's random by the sample, in two loader processes": (
        lambda: Scaled(by_the_sample),
        TWO,
        SAVED,
    ),
}


def with_images(data: Callable[[], Any], changes: dict[str, Any]) -> Callable[[Attempt], None]:
    return lambda attempt: on_images(attempt, data(), **changes)


for _name, (_data, _changes, _saved) in IMAGES.items():
    setup(_name, saved=_saved)(with_images(_data, _changes))


# Models, losses and optimizers.


class ByPython(models.Perceptron):
    """Draws from a generator of Python."""

    def __init__(self) -> None:
        super().__init__()
        self.chance = random.Random(3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return super().forward(x * (0.5 + self.chance.random()), labels)


class Window(models.Perceptron):
    """Keeps the means of its last answers."""

    def __init__(self) -> None:
        super().__init__()
        self.means: deque[float] = deque(maxlen=5)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        answer = super().forward(x, labels)
        loss = answer["loss"] + sum(self.means) / 5 * answer["logits"].mean()
        self.means.append(float(answer["logits"].detach().mean()))
        return {**answer, "loss": loss}


class ByTheModule(models.Perceptron):
    """Draws from a generator of its module."""

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return super().forward(x * (torch.rand(x.shape, generator=NOISE) < 0.8), labels)


def hooked() -> models.Perceptron:
    model, chance = models.Perceptron(), random.Random(5)
    model.layers[0].register_forward_hook(lambda module, args, output: output * (0.5 + chance.random()))
    return model


for _name, _model in {
    "a model that draws from a generator of Python": ByPython,
    "a model that keeps a window of values": Window,
    "a model that draws from a generator of its module": ByTheModule,
    "a hook that draws from a generator": hooked,
}.items():

    def _train(attempt: Attempt, model: Callable[[], Any] = _model) -> None:
        attempt.train(Trainer(model(), attempt.arguments(), train_dataset=models.numbers()))

    setup(_name)(_train)


class Falling:
    """A loss that grows with the number of calls, which another method counts."""

    def __init__(self) -> None:
        self.calls = 0

    def weight(self) -> float:
        self.calls += 1
        return self.calls / 10

    def loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return self.weight() * torch.nn.functional.cross_entropy(outputs["logits"], labels)


@setup("a loss that is a method of an object that counts")
def method(attempt: Attempt) -> None:
    args, loss = attempt.arguments(), Falling().loss
    attempt.train(Trainer(models.bert(), args, train_dataset=models.rows(), compute_loss_func=loss))


class Decaying(torch.optim.SGD):
    """Counts its steps in an attribute."""

    calls = 0

    def step(self, closure: Any = None) -> Any:
        self.calls += 1
        for group in self.param_groups:
            group["lr"] = 0.1 / self.calls
        return super().step(closure)


@setup("an optimizer that counts its steps")
def own_optimizer(attempt: Attempt) -> None:
    model = models.bert()
    optimizer = Decaying(model.parameters(), lr=0.1)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    args = attempt.arguments()
    attempt.train(Trainer(model, args, train_dataset=models.rows(), optimizers=(optimizer, constant)))


# Callbacks.


class Average:
    def __init__(self) -> None:
        self.mean: dict[str, torch.Tensor] = {}

    def update(self, model: torch.nn.Module) -> None:
        for name, value in model.named_parameters():
            self.mean.setdefault(name, value.detach().clone()).lerp_(value.detach(), 0.1)


AVERAGE = Average()


def update_average(model: torch.nn.Module) -> None:
    AVERAGE.update(model)


class Averages(TrainerCallback):
    """Updates an average of the module, and ends with it."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **live: Any) -> None:
        update_average(model)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **live: Any) -> None:
        for name, value in model.named_parameters():
            value.data.copy_(AVERAGE.mean[name])


class EndsEpochs(TrainerCallback):
    """Ends each epoch after four of six steps."""

    def on_step_end(self, args: Any, state: Any, control: Any, **live: Any) -> None:
        control.should_epoch_stop = state.epoch % 1 > 0.6


class DrawsAtLog(TrainerCallback):
    def on_log(self, args: Any, state: Any, control: Any, **live: Any) -> None:
        torch.rand(3)


class Unfreezes(TrainerCallback):
    """Trains the embeddings from the second epoch on."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, model: Any = None, **live: Any) -> None:
        if state.epoch == 1:
            model.requires_grad_(True)


CALLBACKS: dict[str, tuple[type[TrainerCallback], dict[str, Any], int]] = {
    "a callback that updates an average of its module": (Averages, {}, SAVED),
    "a callback that ends epochs early": (EndsEpochs, {"save_strategy": "epoch", "num_train_epochs": 3}, 4),
    "a callback that draws random numbers when an epoch's end is logged": (
        DrawsAtLog,
        {"save_steps": 6, "logging_strategy": "epoch"},
        6,
    ),
}


def with_one(kind: type[TrainerCallback], changes: dict[str, Any]) -> Callable[[Attempt], None]:
    return lambda attempt: with_callback(attempt, kind(), **changes)


for _name, (_kind, _changes, _saved) in CALLBACKS.items():
    setup(_name, saved=_saved)(with_one(_kind, _changes))


@setup("a callback that unfreezes layers in the second epoch")
def unfreezes(attempt: Attempt) -> None:
    model = models.bert()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.bert.embeddings.requires_grad_(False)
    args, optimizers = attempt.arguments(), (optimizer, None)
    attempt.train(
        Trainer(model, args, train_dataset=models.rows(), callbacks=[Unfreezes()], optimizers=optimizers)
    )


# Orders and streams.

ORDERS: dict[str, tuple[dict[str, Any], int]] = {
    "two processes with an order from a generator, resumed from an epoch's last step": (
        {"accelerator_config": {"use_seedable_sampler": False}, "save_steps": 6},
        6,
    ),
    "two processes with batches balanced by length, resumed in the second epoch": (BY_LENGTH, 8),
    "batches balanced by length, resumed in the second epoch": (BY_LENGTH, 8),
}


def with_arguments(name: str, changes: dict[str, Any]) -> Callable[[Attempt], None]:
    batch = 4 if name.startswith("two processes") else 8
    return lambda attempt: attempt.train(
        Trainer(
            models.bert(),
            attempt.arguments(per_device_train_batch_size=batch, **changes),
            train_dataset=models.rows(),
        )
    )


for _name, (_changes, _saved) in ORDERS.items():
    setup(_name, saved=_saved)(with_arguments(_name, _changes))


def with_stream(data: Callable[[], Any], changes: dict[str, Any]) -> Callable[[Attempt], None]:
    return lambda attempt: attempt.train(
        Trainer(
            models.bert(), attempt.arguments(**changes), train_dataset=data(), eval_dataset=models.rows(12)
        )
    )


EACH_PASS: dict[str, Any] = {"max_steps": 14, "save_strategy": "epoch"}
for _name, _data, _changes, _saved in (
    ("a stream saved at the end of each pass", lambda: Stream(models.SAMPLES), EACH_PASS, 6),
    (
        "a stream evaluated and saved at the end of each pass",
        lambda: Stream(models.SAMPLES),
        {**EACH_PASS, "eval_strategy": "epoch"},
        6,
    ),
    (
        "a stream that leaves samples out by chance, in two loader processes",
        DrawingStream,
        {"max_steps": 12, **TWO},
        SAVED,
    ),
):
    setup(_name, saved=_saved)(with_stream(_data, _changes))
