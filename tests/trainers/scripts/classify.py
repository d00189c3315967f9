"""Train a classifier with a plain Trainer, and save it: no line about checkpoints on storage."""

from __future__ import annotations

import gc

import torch
from datasets import load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)


def main() -> None:
    train()
    # Without this, torch 2.13 now and then aborts as a rank exits. While the model of DDP still exists, it now and then hangs:
    # the last owner of the group, a C++ object, waits for a thread of gloo that waits for the GIL.
    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def train() -> None:
    """Train, and save the model."""
    set_seed(7)
    tokenizer = AutoTokenizer.from_pretrained("bert")
    data = load_dataset("json", data_files="train.jsonl", split="train")
    args = TrainingArguments(
        output_dir="out",
        max_steps=60,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        save_steps=5,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
    )
    trainer = Trainer(
        model=AutoModelForSequenceClassification.from_pretrained("bert"),
        args=args,
        train_dataset=data.map(lambda rows: tokenizer(rows["text"]), batched=True),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
