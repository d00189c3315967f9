"""Scripts with Trainer that draw random numbers while they fetch data, or keep state that no checkpoint holds."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset
from transformers import (
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    default_data_collator,
)

from tests.corpus import _models as models
from tests.corpus._attempt import SAVED, Attempt, setup

GENERATOR = np.random.default_rng(0)
"""As modules of augmentations have it."""


def coin_of_torch() -> bool:
    return bool(torch.rand(1) < 0.5)


def coin_of_numpy() -> bool:
    return bool(np.random.rand() < 0.5)


def coin_of_python() -> bool:
    return random.random() < 0.5


# Data that draws.


class Images(Dataset):
    """Flips an image by chance, the usual recipe."""

    def __init__(self, coin: Callable[[], bool]) -> None:
        self.coin = coin

    def __len__(self) -> int:
        return models.SAMPLES

    def __getitem__(self, number: int) -> dict[str, Any]:
        image = models.image(number)
        return {"pixel_values": image.flip(-1) if self.coin() else image, "labels": number % 4}


class Plain(Dataset):
    """A user's own class without chance or state."""

    def __init__(self) -> None:
        self.count = models.SAMPLES

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {"pixel_values": models.image(number), "labels": number % 4}


class Rarely(Plain):
    """Changes one sample in 48 by chance."""

    def __init__(self, which: int) -> None:
        super().__init__()
        self.which = which

    def __getitem__(self, number: int) -> dict[str, Any]:
        sample = super().__getitem__(number)
        if number == self.which:
            sample["pixel_values"] = sample["pixel_values"] + torch.randn(1)
        return sample


class OwnGenerator(Plain):
    """Draws from a generator that the dataset holds."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = np.random.default_rng(1)

    def __getitem__(self, number: int) -> dict[str, Any]:
        sample = super().__getitem__(number)
        return {**sample, "pixel_values": sample["pixel_values"] * float(self.generator.uniform(0.5, 1.5))}


class Brightness:
    """A transform with a generator of its own, as those of albumentations."""

    def __init__(self) -> None:
        self.chance = random.Random(2)

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return image * self.chance.uniform(0.5, 1.5)


class Transformed(Plain):
    """Holds a transform that holds a generator."""

    def __init__(self) -> None:
        super().__init__()
        self.transforms = [Brightness()]

    def __getitem__(self, number: int) -> dict[str, Any]:
        sample = super().__getitem__(number)
        for transform in self.transforms:
            sample["pixel_values"] = transform(sample["pixel_values"])
        return sample


class ModuleGenerator(Plain):
    """Draws from a generator of its module."""

    def __getitem__(self, number: int) -> dict[str, Any]:
        sample = super().__getitem__(number)
        return {**sample, "pixel_values": sample["pixel_values"] * float(GENERATOR.uniform(0.5, 1.5))}


class Curriculum(Plain):
    """Counts its reads, and makes the samples harder."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __getitem__(self, number: int) -> dict[str, Any]:
        self.reads += 1
        sample = super().__getitem__(number)
        return {**sample, "pixel_values": sample["pixel_values"] * min(1.0, self.reads / 90)}


class Epochs(Plain):
    """Is told of epochs by its own callback, and makes the samples harder."""

    def __init__(self) -> None:
        super().__init__()
        self.epoch = 0.0

    def __getitem__(self, number: int) -> dict[str, Any]:
        sample = super().__getitem__(number)
        return {**sample, "pixel_values": sample["pixel_values"] * (0.5 + self.epoch / 2)}


def on_images(attempt: Attempt, data: Any, **changes: Any) -> None:
    callbacks = changes.pop("callbacks", None)
    args = attempt.arguments(**{"remove_unused_columns": False, **changes})
    attempt.train(Trainer(models.resnet(), args, train_dataset=data, callbacks=callbacks))


IMAGES: dict[str, tuple[Callable[[], Any], dict[str, Any], int]] = {
    "augmentation that draws from torch": (lambda: Images(coin_of_torch), {}, SAVED),
    "augmentation that draws from numpy": (lambda: Images(coin_of_numpy), {}, SAVED),
    "augmentation that draws from Python's random": (lambda: Images(coin_of_python), {}, SAVED),
    "augmentation, resumed from an epoch's last step": (lambda: Images(coin_of_torch), {"save_steps": 6}, 6),
    "augmentation in two loader processes": (
        lambda: Images(coin_of_torch),
        {"dataloader_num_workers": 2},
        SAVED,
    ),
    "augmentation by Python's random in two loader processes": (
        lambda: Images(coin_of_python),
        {"dataloader_num_workers": 2},
        SAVED,
    ),
    "augmentation in persistent loader processes": (
        lambda: Images(coin_of_torch),
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "num_train_epochs": 3},
        SAVED,
    ),
    "a dataset of the user's own": (Plain, {}, SAVED),
    "a dataset of the user's own in two loader processes": (Plain, {"dataloader_num_workers": 2}, SAVED),
    "one sample in 48 is augmented, far from the resume": (lambda: Rarely(RARE["far"]), {}, SAVED),
    "one sample in 48 is augmented, in the next batch": (lambda: Rarely(RARE["next"]), {}, SAVED),
    "one sample in 48 is augmented, in the batch after the next": (
        lambda: Rarely(RARE["after next"]),
        {},
        SAVED,
    ),
    "one sample in 48 is augmented, and was never fetched before": (
        lambda: Rarely(RARE["first"]),
        {},
        4,
    ),
    "augmentation by a generator of the dataset's own": (OwnGenerator, {}, SAVED),
    "augmentation by a transform with a generator of its own": (Transformed, {}, SAVED),
    "augmentation by a generator of the module": (ModuleGenerator, {}, SAVED),
    "a dataset that counts its reads": (Curriculum, {}, SAVED),
}
RARE = {"far": 5, "next": 24, "after next": 30, "first": 23}
"""Samples by where the order of seed 42 has them: in the last batch of the second epoch, in its third, in its fourth; in the
last of the first."""


def with_images(data: Callable[[], Any], changes: dict[str, Any]) -> Callable[[Attempt], None]:
    return lambda attempt: on_images(attempt, data(), **changes)


for _name, (_data, _changes, _saved) in IMAGES.items():
    setup(_name, saved=_saved)(with_images(_data, _changes))


class TellEpoch(TrainerCallback):
    """Tells a dataset which epoch it is."""

    def __init__(self, data: Epochs) -> None:
        self.data = data

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **live: Any) -> None:
        self.data.epoch = float(int(state.epoch or 0))


@setup("a dataset that a callback tells the epoch")
def told(attempt: Attempt) -> None:
    data = Epochs()
    on_images(attempt, data, callbacks=[TellEpoch(data)])


@setup("set_transform with a random transform")
def set_transform(attempt: Attempt) -> None:
    data = models.hub_dataset()

    def shorten(rows: dict[str, Any]) -> dict[str, Any]:
        return {
            **rows,
            "input_ids": [[0, *ids[1:]] if random.random() < 0.5 else ids for ids in rows["input_ids"]],
        }

    data.set_transform(shorten)
    args = attempt.arguments(remove_unused_columns=False)
    attempt.train(Trainer(models.bert(), args, train_dataset=data))


@setup("set_transform without chance")
def set_plain_transform(attempt: Attempt) -> None:
    data = models.hub_dataset()
    data.set_transform(lambda rows: {**rows, "input_ids": [list(reversed(ids)) for ids in rows["input_ids"]]})
    args = attempt.arguments(remove_unused_columns=False)
    attempt.train(Trainer(models.bert(), args, train_dataset=data))


def masked(attempt: Attempt, collator: Any, **changes: Any) -> None:
    data = models.hub_dataset().remove_columns("labels")
    attempt.train(
        Trainer(
            models.masked_bert(), attempt.arguments(**changes), train_dataset=data, data_collator=collator
        )
    )


@setup("masked language modeling")
def mlm(attempt: Attempt) -> None:
    masked(attempt, DataCollatorForLanguageModeling(models.tokenizer()))


@setup("masked language modeling, resumed from an epoch's last step", saved=6)
def mlm_at_end(attempt: Attempt) -> None:
    masked(attempt, DataCollatorForLanguageModeling(models.tokenizer()), save_steps=6)


@setup("masks of whole words")
def whole_words(attempt: Attempt) -> None:
    tokenizer = models.tokenizer()
    collator = DataCollatorForLanguageModeling(tokenizer, whole_word_mask=True)
    offsets = [[2 * at, 2 * at + 1] for at in range(models.LENGTH)]  # each token a word
    data = [{"input_ids": row["input_ids"], "offset_mapping": offsets} for row in models.rows()]
    args = attempt.arguments(remove_unused_columns=False)
    attempt.train(Trainer(models.masked_bert(), args, train_dataset=data, data_collator=collator))


@setup("a collator that drops words at random")
def random_collator(attempt: Attempt) -> None:
    def drop(samples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = default_data_collator(samples)
        return {**batch, "input_ids": batch["input_ids"] * (torch.rand(batch["input_ids"].shape) < 0.8)}

    attempt.train(
        Trainer(models.bert(), attempt.arguments(), train_dataset=models.rows(), data_collator=drop)
    )


@setup("a collator of the user's own, without chance")
def plain_collator(attempt: Attempt) -> None:
    def pad(samples: list[dict[str, Any]]) -> dict[str, Any]:
        return {key: torch.tensor([sample[key] for sample in samples]) for key in samples[0]}

    attempt.train(Trainer(models.bert(), attempt.arguments(), train_dataset=models.rows(), data_collator=pad))


class CountingCollator:
    """Keeps more words of each sample as training goes on."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        self.calls += 1
        batch = default_data_collator(samples)
        return {**batch, "input_ids": batch["input_ids"][:, : 2 + self.calls // 2]}


@setup("a collator that counts its calls")
def counting_collator(attempt: Attempt) -> None:
    args = attempt.arguments()
    attempt.train(Trainer(models.bert(), args, train_dataset=models.rows(), data_collator=CountingCollator()))


class DrawingStream(IterableDataset):
    """Leaves samples out by chance."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in range(300):
            if random.random() < 0.7:
                yield models.row(number)


@setup("a stream that leaves samples out by chance")
def drawing_stream(attempt: Attempt) -> None:
    attempt.train(Trainer(models.bert(), attempt.arguments(max_steps=12), train_dataset=DrawingStream()))


# State that no checkpoint holds.


class Mean(TrainerCallback):
    """An EMA of the weights, which replaces them at the end."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **live: Any) -> None:
        self.mean = {name: value.detach().clone() for name, value in model.named_parameters()}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **live: Any) -> None:
        for name, value in model.named_parameters():
            self.mean[name].lerp_(value.detach(), 0.1)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **live: Any) -> None:
        for name, value in model.named_parameters():
            value.data.copy_(self.mean[name])


class Countdown(TrainerCallback):
    """Lowers the learning rate after some calls."""

    def __init__(self) -> None:
        self.calls = 0

    def on_step_end(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **live: Any) -> None:
        self.calls += 1
        if self.calls == 10:
            lr_scheduler.base_lrs = [0.1 * rate for rate in lr_scheduler.base_lrs]


class Losses(TrainerCallback):
    """Collects what was logged for a picture, and changes nothing."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **live: Any) -> None:
        self.losses.append(logs.get("loss"))


class DrawsAtSave(TrainerCallback):
    """Draws a random number after each save."""

    def on_save(self, args: Any, state: Any, control: Any, **live: Any) -> None:
        torch.rand(3)


class DrawsAtEpoch(TrainerCallback):
    """Draws a random number when an epoch begins."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **live: Any) -> None:
        torch.rand(3)


def with_callback(attempt: Attempt, callback: Any, **changes: Any) -> None:
    args = attempt.arguments(**{"lr_scheduler_type": "constant", **changes})
    attempt.train(Trainer(models.bert(), args, train_dataset=models.rows(), callbacks=[callback]))


@setup("a callback that keeps a mean of the weights")
def mean(attempt: Attempt) -> None:
    with_callback(attempt, Mean())


@setup("a callback that lowers the learning rate after some calls")
def countdown(attempt: Attempt) -> None:
    with_callback(attempt, Countdown())


@setup("a callback that collects losses")
def losses(attempt: Attempt) -> None:
    with_callback(attempt, Losses())


@setup("a callback that draws random numbers after a save")
def draws_at_save(attempt: Attempt) -> None:
    with_callback(attempt, DrawsAtSave())


@setup("a callback that draws random numbers as an epoch begins, resumed within an epoch")
def draws_at_epoch(attempt: Attempt) -> None:
    with_callback(attempt, DrawsAtEpoch())


@setup("a callback that draws random numbers as an epoch begins, resumed from an epoch's last step", saved=6)
def draws_between_epochs(attempt: Attempt) -> None:
    with_callback(attempt, DrawsAtEpoch(), save_steps=6)


class Weighted(torch.nn.Module):
    """A loss with a weight of its own that is learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(2))

    def forward(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(outputs["logits"] * self.scale, labels)


@setup("a loss whose own weights are trained")
def weighted_loss(attempt: Attempt) -> None:
    model, loss = models.bert(), Weighted()
    optimizer = torch.optim.AdamW([*model.parameters(), *loss.parameters()], lr=1e-2)
    attempt.train(
        Trainer(
            model,
            attempt.arguments(),
            train_dataset=models.rows(),
            optimizers=(optimizer, None),
            compute_loss_func=loss,
        )
    )


@setup("a loss function of the user's own")
def own_loss(attempt: Attempt) -> None:
    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(outputs["logits"], labels, label_smoothing=0.1)

    attempt.train(
        Trainer(models.bert(), attempt.arguments(), train_dataset=models.rows(), compute_loss_func=loss)
    )


class RunningLoss:
    """Divides the loss by its running mean."""

    def __init__(self) -> None:
        self.mean = 1.0

    def __call__(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        loss = torch.nn.functional.cross_entropy(outputs["logits"], labels)
        self.mean = 0.9 * self.mean + 0.1 * float(loss)
        return loss + 0.1 * self.mean * outputs["logits"].square().mean()


@setup("a loss that keeps a running mean")
def running_loss(attempt: Attempt) -> None:
    args = attempt.arguments()
    attempt.train(Trainer(models.bert(), args, train_dataset=models.rows(), compute_loss_func=RunningLoss()))


class HiddenBuffer(models.Perceptron):
    """A buffer that changes, and that no state_dict holds."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()), persistent=False)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        answer = super().forward(x, labels)
        self.mean.lerp_(answer["logits"].detach().mean(), 0.1)
        return {**answer, "loss": answer["loss"] + self.mean * answer["logits"].mean()}


class ConstantBuffer(models.Perceptron):
    """A buffer that no state_dict holds, and that never changes, as position ids."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.full((4,), 0.5), persistent=False)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return super().forward(x * self.scale, labels)


class Annealed(models.Perceptron):
    """Counts its calls, and weighs a term of the loss by them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        self.calls += 1
        answer = super().forward(x, labels)
        return {
            **answer,
            "loss": answer["loss"] + min(1.0, self.calls / 20) * answer["logits"].square().mean(),
        }


class OwnDropout(models.Perceptron):
    """Draws from a generator that the model holds."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return super().forward(x * (torch.rand(x.shape, generator=self.generator) < 0.8), labels)


for _name, _model in {
    "a buffer that changes and is not persistent": HiddenBuffer,
    "a buffer that is not persistent, and constant": ConstantBuffer,
    "a model that counts its calls": Annealed,
    "a model that draws from a generator of its own": OwnDropout,
}.items():

    def _train(attempt: Attempt, model: type[models.Perceptron] = _model) -> None:
        attempt.train(Trainer(model(), attempt.arguments(), train_dataset=models.numbers()))

    setup(_name)(_train)


class OwnLoss(Trainer):
    """Overrides the loss, the most frequent subclass of all."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **more: Any) -> Any:
        outputs = model(**inputs)
        loss = outputs["loss"] + 0.01 * outputs["logits"].square().mean()
        return (loss, outputs) if return_outputs else loss


class Replay(Trainer):
    """Adds the batch before to each batch."""

    before: Any = None

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **more: Any) -> Any:
        outputs = model(**inputs)
        loss = outputs["loss"] + (model(**self.before)["loss"] if self.before else 0)
        self.before = inputs
        return (loss, outputs) if return_outputs else loss


@setup("a subclass that overrides compute_loss")
def subclass(attempt: Attempt) -> None:
    attempt.train(OwnLoss(models.bert(), attempt.arguments(), train_dataset=models.rows()))


@setup("a subclass that keeps batches")
def replay(attempt: Attempt) -> None:
    attempt.train(Replay(models.bert(), attempt.arguments(), train_dataset=models.rows()))
