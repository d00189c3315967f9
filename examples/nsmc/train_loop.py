"""Train on NSMC in a loop on Accelerate. `TrainLoop` is all that hf_cloudtrain adds.

    python examples/nsmc/train_loop.py --data_dir nsmc --run_url s3://bucket/runs/nsmc
    torchrun --nproc_per_node 2 examples/nsmc/train_loop.py --data_dir nsmc --run_url s3://bucket/runs/nsmc

After a crash, run the same command here or on an empty machine to resume. Then try classify.py.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from nsmc_data import LengthGroupedSampler, Splits, load_splits
from nsmc_model import BATCH_SIZE, EPOCHS, LEARNING_RATE, MAX_LENGTH, WARMUP, make_model
from nsmc_tokenizer import check_vocabulary, encode, make_tokenizer
from torch.utils.data import DataLoader, Sampler, SubsetRandomSampler
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    get_linear_schedule_with_warmup,
)

from hf_cloudtrain import TrainLoop


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, and test the best model. Return the metrics of the test."""
    args = parse(argv)
    set_seed(args.seed)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), project_dir=args.output_dir)

    reviews = load_splits(args.data_dir, subset=args.subset, seed=args.seed)
    tokenizer = make_tokenizer(reviews.train["document"], args.max_length)
    data = Splits(*(encode(rows, tokenizer) for rows in reviews))
    collate = DataCollatorWithPadding(tokenizer)
    order: Sampler[int] = LengthGroupedSampler(
        list(map(len, data.train["input_ids"])), args.batch_size, args.seed
    )
    if args.sample:
        chosen = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(args.seed))
        order = SubsetRandomSampler(chosen[: args.sample].tolist())
    train_loader = DataLoader(data.train, args.batch_size, sampler=order, collate_fn=collate)
    validation_loader, test_loader = (
        DataLoader(rows, 256, collate_fn=collate) for rows in (data.validation, data.test)
    )

    model = make_model(tokenizer, args.max_length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    steps = args.num_epochs * len(
        train_loader
    )  # of one process: a prepared scheduler counts the steps of all
    scheduler = get_linear_schedule_with_warmup(optimizer, round(WARMUP * steps), steps)
    model, optimizer, scheduler, train_loader, validation_loader, test_loader = accelerator.prepare(
        model, optimizer, scheduler, train_loader, validation_loader, test_loader
    )

    loop = TrainLoop(
        accelerator,
        args.run_url,
        num_epochs=args.num_epochs,
        save_steps=args.save_steps,
        output_dir=args.output_dir,
        processing_class=tokenizer,
        metric_for_best_model="accuracy",
        script_args=vars(args),
    )
    check_vocabulary(loop.resume(), tokenizer)
    for _ in loop.epochs():  # continues where the last attempt stopped
        model.train()
        for batch in loop.steps(train_loader):  # skips what was trained, saves every save_steps
            loss = model(**batch).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            loop.log(loss=loss)
        loop.end_epoch(evaluate(model, loop.eval_batches(validation_loader), accelerator))

    best = AutoModelForSequenceClassification.from_pretrained(Path(loop.output_dir, "best"))
    metrics = evaluate(best.to(accelerator.device), test_loader, accelerator)
    accelerator.print(f"{len(data.test)} test reviews: {metrics}")
    return metrics


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data_dir", required=True, help="folder with ratings_{train,test}.txt or {train,test}*.parquet")
    run_url = os.getenv("HF_CLOUDTRAIN_RUN_URL", "nsmc-run")
    add("--run_url", default=run_url, help="URL of the run, such as s3://bucket/nsmc (%(default)s)")
    add("--output_dir", default="nsmc-output", help="local folder for checkpoints and best/ (%(default)s)")
    add("--subset", type=int, help="train on N reviews only, test on a third of N")
    add("--sample", type=int, help="for development: an epoch has only N of the training reviews")
    add("--num_epochs", type=int, default=EPOCHS, help="(%(default)s)")
    add("--batch_size", type=int, default=BATCH_SIZE, help="reviews in a step of each process (%(default)s)")
    add("--learning_rate", type=float, default=LEARNING_RATE, help="maximum learning rate (%(default)s)")
    add(
        "--max_length",
        type=int,
        default=MAX_LENGTH,
        help="truncate reviews to this many tokens (%(default)s)",
    )
    add("--save_steps", type=int, default=500, help="optimizer steps between checkpoints (%(default)s)")
    add("--seed", type=int, default=42, help="of weights, order and validation split (%(default)s)")
    return parser.parse_args(argv)


def evaluate(model: Any, batches: Iterable[Any], accelerator: Accelerator) -> dict[str, float]:
    """Return the mean loss and the accuracy over all processes."""
    model.eval()
    loss, hits, count = 0.0, 0, 0
    for batch in batches:
        with torch.no_grad():
            logits = model(batch["input_ids"], batch["attention_mask"]).logits
        logits, labels = accelerator.gather_for_metrics((logits, batch["labels"]))
        loss += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        hits += int((logits.argmax(-1) == labels).sum())
        count += len(labels)
    return {"loss": loss / count, "accuracy": hits / count}


if __name__ == "__main__":
    main()
