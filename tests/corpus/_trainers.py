"""Scripts with Trainer that a checkpoint describes in full, so that a resume is exact, and those that it cannot."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import peft
import torch
from torch.utils.data import ConcatDataset, IterableDataset, Subset
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
)
from transformers.trainer_callback import ExportableState

from tests.corpus import _models as models
from tests.corpus._attempt import SAVED, Attempt, setup

LATER = {"metric_for_best_model": "loss", "eval_strategy": "steps", "eval_steps": 4}

ARGUMENTS: dict[str, tuple[dict[str, Any], int]] = {
    "a list of samples": ({}, SAVED),
    "three epochs, resumed in the first": ({"num_train_epochs": 3}, 4),
    "three epochs, resumed in the second": ({"num_train_epochs": 3}, 8),
    "three epochs, resumed in the third": ({"num_train_epochs": 3}, 16),
    "resumed from an epoch's last step": ({"save_steps": 6}, 6),
    "max_steps beyond one epoch": ({"max_steps": 14}, 8),
    "save_strategy epoch": ({"save_strategy": "epoch"}, 6),
    "no shuffling": ({"train_sampling_strategy": "sequential"}, SAVED),
    "a seed of its own for the data": ({"data_seed": 7}, SAVED),
    "dataloader_drop_last": ({"dataloader_drop_last": True, "per_device_train_batch_size": 7}, SAVED),
    "gradient accumulation": ({"gradient_accumulation_steps": 2, "save_steps": 2}, 4),
    "gradient accumulation with a short last step": ({"gradient_accumulation_steps": 4, "save_steps": 1}, 3),
    "evaluation every few steps": ({"eval_strategy": "steps", "eval_steps": 3}, SAVED),
    "evaluation at each epoch's end": ({"eval_strategy": "epoch"}, SAVED),
    "saved at an epoch's last step, where evaluation follows": (
        {"eval_strategy": "epoch", "save_steps": 6},
        6,
    ),
    "evaluation before the first step": (
        {"eval_strategy": "steps", "eval_steps": 4, "eval_on_start": True},
        SAVED,
    ),
    "the best model loaded at the end": ({**LATER, "load_best_model_at_end": True}, SAVED),
    "save_strategy best": ({**LATER, "save_strategy": "best"}, SAVED),
    "save_total_limit": ({"save_total_limit": 1}, SAVED),
    "two loader processes and a list": ({"dataloader_num_workers": 2}, SAVED),
    "loader processes that fetch far ahead": (
        {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 4},
        SAVED,
    ),
    "persistent loader processes": (
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "num_train_epochs": 3},
        SAVED,
    ),
    "persistent loader processes and evaluation": (
        {
            "dataloader_num_workers": 1,
            "dataloader_persistent_workers": True,
            "num_train_epochs": 3,
            "eval_strategy": "epoch",
        },
        SAVED,
    ),
    "label smoothing": ({"label_smoothing_factor": 0.1}, SAVED),
    "NEFTune, which draws noise for embeddings": ({"neftune_noise_alpha": 5.0}, SAVED),
    "cosine schedule with warmup": ({"lr_scheduler_type": "cosine", "warmup_steps": 3}, SAVED),
    "polynomial schedule": ({"lr_scheduler_type": "polynomial"}, SAVED),
    "constant learning rate with warmup": (
        {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 10},
        SAVED,
    ),
    "a learning rate that falls on a plateau": (
        {**LATER, "lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0}},
        SAVED,
    ),
    "Adafactor": ({"optim": "adafactor"}, SAVED),
    "SGD with momentum": ({"optim": "sgd", "optim_args": "momentum=0.9"}, SAVED),
    "weight decay, without gradient clipping": ({"weight_decay": 0.1, "max_grad_norm": 0.0}, SAVED),
    "bf16": ({"bf16": True}, SAVED),
    "gradient checkpointing": ({"gradient_checkpointing": True}, SAVED),
    "counting input tokens": ({"include_num_input_tokens_seen": "all"}, SAVED),
    "auto_find_batch_size": ({"auto_find_batch_size": True}, SAVED),
    "split_batches": ({"accelerator_config": {"split_batches": True}}, SAVED),
    "remove_unused_columns=False": ({"remove_unused_columns": False}, SAVED),
    "an order drawn from global states, resumed in the first epoch": (
        {"accelerator_config": {"use_seedable_sampler": False}},
        4,
    ),
    "an order drawn from global states, resumed in the second epoch": (
        {"accelerator_config": {"use_seedable_sampler": False}},
        8,
    ),
    "samples grouped by length, resumed in the first epoch": (
        {"train_sampling_strategy": "group_by_length"},
        4,
    ),
    "samples grouped by length, resumed in the second epoch": (
        {"train_sampling_strategy": "group_by_length"},
        8,
    ),
    "save_only_model": ({"save_only_model": True}, SAVED),
    "ignore_data_skip, resumed within an epoch": ({"ignore_data_skip": True}, SAVED),
    "ignore_data_skip, resumed from an epoch's last step": ({"ignore_data_skip": True, "save_steps": 6}, 6),
    "two processes": ({"per_device_train_batch_size": 4}, SAVED),
    "two processes with gradient accumulation": (
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        SAVED,
    ),
}
"""A BERT classifier on a list of samples, with these arguments, and the step that is resumed from."""


def with_arguments(changes: dict[str, Any]) -> Any:
    def script(attempt: Attempt) -> None:
        attempt.train(
            Trainer(
                models.bert(),
                attempt.arguments(**changes),
                train_dataset=models.rows(),
                eval_dataset=models.rows(12),
            )
        )

    return script


for _name, (_changes, _saved) in ARGUMENTS.items():
    setup(_name, saved=_saved)(with_arguments(_changes))


# Models.


@setup("a dataset of the hub")
def hub_dataset(attempt: Attempt) -> None:
    attempt.train(Trainer(models.bert(), attempt.arguments(), train_dataset=models.hub_dataset()))


@setup("a dataset of the hub in two loader processes")
def hub_dataset_in_processes(attempt: Attempt) -> None:
    args = attempt.arguments(dataloader_num_workers=2)
    attempt.train(Trainer(models.bert(), args, train_dataset=models.hub_dataset()))


@setup("a dataset of the hub in the format of torch")
def hub_dataset_of_tensors(attempt: Attempt) -> None:
    data = models.hub_dataset().with_format("torch")
    attempt.train(Trainer(models.bert(), attempt.arguments(), train_dataset=data))


@setup("a part of two lists joined")
def subset(attempt: Attempt) -> None:
    data = Subset(ConcatDataset([models.rows(30), models.rows(30)]), range(6, 54))
    attempt.train(Trainer(models.bert(), attempt.arguments(), train_dataset=data))


@setup("frozen layers")
def frozen(attempt: Attempt) -> None:
    model = models.bert()
    for parameter in model.bert.embeddings.parameters():
        parameter.requires_grad_(False)
    attempt.train(Trainer(model, attempt.arguments(), train_dataset=models.rows()))


@setup("a causal language model with tied weights")
def causal(attempt: Attempt) -> None:
    collator = DataCollatorForLanguageModeling(models.tokenizer(), mlm=False)
    data = models.hub_dataset().remove_columns("labels")
    attempt.train(Trainer(models.gpt2(), attempt.arguments(), train_dataset=data, data_collator=collator))


@setup("LoRA")
def lora(attempt: Attempt) -> None:
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_dropout=0.1, target_modules=["query", "value"])
    model = peft.get_peft_model(models.bert(), config)
    attempt.train(Trainer(model, attempt.arguments(), train_dataset=models.rows()))


@setup("Seq2SeqTrainer")
def seq2seq(attempt: Attempt) -> None:
    model = models.t5()
    data = [{**row, "labels": row["input_ids"][:5]} for row in models.rows()]
    collator = DataCollatorForSeq2Seq(models.tokenizer(), model)
    args = attempt.arguments(Seq2SeqTrainingArguments)
    attempt.train(Seq2SeqTrainer(model, args, train_dataset=data, data_collator=collator))


@setup("padding to the longest of a batch")
def padding(attempt: Attempt) -> None:
    data = [models.row(number, 3 + number % 5) for number in range(models.SAMPLES)]
    collator = DataCollatorWithPadding(models.tokenizer())
    attempt.train(Trainer(models.bert(), attempt.arguments(), train_dataset=data, data_collator=collator))


@setup("batch norm")
def batch_norm(attempt: Attempt) -> None:
    data = [{"pixel_values": models.image(number), "labels": number % 4} for number in range(models.SAMPLES)]
    attempt.train(Trainer(models.resnet(), attempt.arguments(), train_dataset=data))


@setup("an image model whose weights have other names in a checkpoint")
def renamed(attempt: Attempt) -> None:
    """transformers 5 saves some models under the names of version 4, and Trainer does not find them again."""
    data = [{"pixel_values": models.image(number), "labels": number % 4} for number in range(models.SAMPLES)]
    attempt.train(Trainer(models.vit(), attempt.arguments(), train_dataset=data))


@setup("a model of the user's own")
def own_model(attempt: Attempt) -> None:
    attempt.train(Trainer(models.Perceptron(), attempt.arguments(), train_dataset=models.numbers()))


@setup("groups of parameters and a schedule of the user's own")
def own_optimizer(attempt: Attempt) -> None:
    model = models.bert()
    groups = [
        {"params": model.bert.parameters(), "lr": 1e-3},
        {"params": model.classifier.parameters(), "lr": 1e-2, "weight_decay": 0.1},
    ]
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    attempt.train(
        Trainer(model, attempt.arguments(), train_dataset=models.rows(), optimizers=(optimizer, schedule))
    )


# Streams.


class Stream(IterableDataset):
    def __init__(self, count: int = 2 * models.SAMPLES) -> None:
        self.count = count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in range(self.count):
            yield models.row(number)


def stream(attempt: Attempt, data: Any, *, max_steps: int = 12, **changes: Any) -> None:
    attempt.train(
        Trainer(models.bert(), attempt.arguments(max_steps=max_steps, **changes), train_dataset=data)
    )


@setup("a stream read once")
def one_pass(attempt: Attempt) -> None:
    stream(attempt, Stream())


@setup("a stream read once, dispatched by the first process")
def dispatched(attempt: Attempt) -> None:
    stream(attempt, Stream(), accelerator_config={"dispatch_batches": True})


@setup("a stream of the hub")
def hub_stream(attempt: Attempt) -> None:
    stream(attempt, models.hub_dataset(96).to_iterable_dataset(num_shards=2))


@setup("a shuffled stream of the hub")
def shuffled_stream(attempt: Attempt) -> None:
    stream(attempt, models.hub_dataset(96).to_iterable_dataset(num_shards=2).shuffle(seed=3, buffer_size=16))


@setup("two streams of the hub, mixed")
def mixed_streams(attempt: Attempt) -> None:
    from datasets import interleave_datasets

    parts = [models.hub_dataset(96).to_iterable_dataset() for _ in range(2)]
    stream(attempt, interleave_datasets(parts, probabilities=[0.7, 0.3], seed=5))


@setup("a stream read twice, resumed in the first pass", saved=4)
def first_pass(attempt: Attempt) -> None:
    stream(attempt, Stream(models.SAMPLES), max_steps=14)


@setup("a stream read twice, resumed between the passes", saved=6)
def between_passes(attempt: Attempt) -> None:
    stream(attempt, Stream(models.SAMPLES), max_steps=14, save_steps=6)


@setup("a stream read twice, resumed in the second pass", saved=8)
def second_pass(attempt: Attempt) -> None:
    stream(attempt, Stream(models.SAMPLES), max_steps=14)


@setup("a stream read three times, resumed late in the third pass", saved=16)
def third_pass(attempt: Attempt) -> None:
    stream(attempt, Stream(models.SAMPLES), max_steps=20)


@setup("a shuffled stream of the hub read twice, resumed in the second pass", saved=8)
def shuffled_second_pass(attempt: Attempt) -> None:
    data = models.hub_dataset().to_iterable_dataset(num_shards=2).shuffle(seed=3, buffer_size=16)
    stream(attempt, data, max_steps=14)


# Callbacks.


class Constants(TrainerCallback):
    """Tells its settings now and then, and changes nothing."""

    def __init__(self, every: int = 4, name: str = "mine") -> None:
        self.every, self.name, self.words = every, name, ("a", "b")

    def on_step_end(self, args: Any, state: Any, control: Any, **live: Any) -> None:
        if state.global_step % self.every == 0:
            assert self.name == "mine"


class LateLog(TrainerCallback):
    """Draws a random number whenever something is logged, as one that shows a few samples does."""

    def on_log(self, args: Any, state: Any, control: Any, **live: Any) -> None:
        torch.rand(3)


class Noise(TrainerCallback):
    """Adds noise to the gradients."""

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **live: Any
    ) -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.add_(1e-3 * torch.randn_like(parameter))


class Decay(TrainerCallback, ExportableState):
    """Lowers the learning rate after some calls, and exports how many there were."""

    def __init__(self, calls: int = 0) -> None:
        self.calls = calls

    def on_step_end(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **live: Any) -> None:
        self.calls += 1
        if self.calls == 10:
            lr_scheduler.base_lrs = [0.1 * rate for rate in lr_scheduler.base_lrs]

    def state(self) -> dict[str, Any]:
        return {"args": {"calls": self.calls}, "attributes": {}}


def with_callback(attempt: Attempt, callback: Any, **changes: Any) -> None:
    trainer = Trainer(
        models.bert(),
        attempt.arguments(**{"lr_scheduler_type": "constant", **changes}),
        train_dataset=models.rows(),
        eval_dataset=models.rows(12),
        compute_metrics=lambda predicted: {"constant": 1.0},
        callbacks=[callback],
    )
    attempt.train(trainer)


@setup("a callback with nothing but settings")
def constants(attempt: Attempt) -> None:
    with_callback(attempt, Constants())


@setup("a callback that draws random numbers when something is logged")
def late_log(attempt: Attempt) -> None:
    with_callback(attempt, LateLog())


@setup("a callback that adds noise to gradients")
def noise(attempt: Attempt) -> None:
    with_callback(attempt, Noise())


@setup("a callback that exports its state, restored")
def exported(attempt: Attempt) -> None:
    with_callback(attempt, Decay(), restore_callback_states_from_checkpoint=True)


@setup("a callback that exports its state, not restored")
def not_restored(attempt: Attempt) -> None:
    with_callback(attempt, Decay())


# Early stopping: 24 steps in four epochs, an evaluation every two, and a metric that never improves.
STOPPING = {
    "num_train_epochs": 4,
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "metric_for_best_model": "constant",
    "greater_is_better": True,
}


@setup("early stopping, restored", saved=6)
def early_stopping(attempt: Attempt) -> None:
    with_callback(attempt, EarlyStoppingCallback(4), restore_callback_states_from_checkpoint=True, **STOPPING)


@setup("early stopping, not restored", saved=6)
def early_stopping_starts_over(attempt: Attempt) -> None:
    with_callback(attempt, EarlyStoppingCallback(4), **STOPPING)


@setup("early stopping, not restored, while each evaluation is better", saved=6)
def early_stopping_of_no_effect(attempt: Attempt) -> None:
    args = attempt.arguments(**STOPPING, learning_rate=1e-2)
    trainer = Trainer(
        models.bert(),
        args,
        train_dataset=models.rows(),
        eval_dataset=models.rows(12),
        callbacks=[EarlyStoppingCallback(2)],
    )
    trainer.compute_metrics = lambda predicted: {"constant": float(trainer.state.global_step)}
    attempt.train(trainer)
