"""Train a classifier with a plain Trainer, and save it: no line about checkpoints on storage."""

from __future__ import annotations

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
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # without it, torch 2.13 now and then aborts as a rank exits


if __name__ == "__main__":
    main()
