"""The full training loop of the Hugging Face course on a GLUE task. The lines marked `# cloud:` are what hf_cloudtrain adds.

The first command trains a small BERT on synthetic data and downloads nothing. The second fine-tunes a pretrained model on MRPC;
the same command on any machine resumes the run:

    python examples/glue/train.py
    accelerate launch --num_processes 2 examples/glue/train.py --task_name mrpc \
        --model_name_or_path bert-base-uncased --learning_rate 5e-5 --run_url s3://bucket/runs/mrpc

On a machine with fewer accelerators than processes, for example without any, `accelerate launch` needs `--multi_gpu` to start
more than one process.
"""

import argparse
import logging
import math
import os
from dataclasses import fields

import evaluate
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import DatasetDict
from glue_tasks import TASKS, Task
from run_glue import (
    METRIC,
    SMALL_BERT_LEARNING_RATE,
    DataArguments,
    ModelArguments,
    load_data,
    load_model,
    outcome,
    tokenize,
)
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, SchedulerType, get_scheduler

from hf_cloudtrain import TrainLoop  # cloud: the import

logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train as the options say and evaluate after each epoch. Return the metrics of the last evaluation."""
    args = parse(argv)
    # Without `cpu`, processes on a machine without an accelerator train independently of each other.
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(), gradient_accumulation_steps=args.gradient_accumulation_steps
    )
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logger.setLevel(logging.INFO if accelerator.is_main_process else logging.WARNING)
    warn_if_alone()
    set_seed(args.seed)

    task = TASKS[args.task_name]
    data_args, model_args = split(args)
    with accelerator.main_process_first():
        raw = load_data(data_args, model_args)
    for name in task.test_splits:
        raw.pop(name, None)  # their labels are not published
    model, tokenizer = load_model(data_args, model_args, task, raw)
    with accelerator.main_process_first():
        data = as_tensors(tokenize(raw, tokenizer, data_args, task), task)
    train_dataloader, eval_dataloaders = make_dataloaders(args, task, data, tokenizer)

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
    model, optimizer, train_dataloader = accelerator.prepare(model, optimizer, train_dataloader)
    eval_dataloaders = {ending: accelerator.prepare(loader) for ending, loader in eval_dataloaders.items()}
    updates = args.num_train_epochs * math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
    # A prepared scheduler makes one step for each process at every update.
    lr_scheduler = accelerator.prepare(
        get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=args.num_warmup_steps * accelerator.num_processes,
            num_training_steps=updates * accelerator.num_processes,
        )
    )

    loop = TrainLoop(  # cloud: names the run and resumes it
        accelerator,
        args.run_url,
        num_epochs=args.num_train_epochs,
        save_steps=args.save_steps,
        output_dir=args.output_dir,
        processing_class=tokenizer,
        metric_for_best_model=args.metric_for_best_model,
        script_args=vars(args),
        logging_steps=args.logging_steps,
    )
    metrics: dict[str, float] = {}
    for epoch in loop.epochs():  # cloud: instead of range(num_train_epochs)
        model.train()
        for batch in loop.steps(train_dataloader):  # cloud: instead of train_dataloader
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            loop.log(loss=loss)  # cloud: reads the device only every logging_steps
            if accelerator.sync_gradients and loop.global_step + 1 == args.stop_after_steps:
                loop.stop()  # cloud: as a preemption does
        if loop.global_step == args.stop_after_steps:
            continue
        model.eval()
        metrics = {}
        for ending, eval_dataloader in eval_dataloaders.items():
            figures = evaluate_on(eval_dataloader, accelerator, loop, model, args.task_name)
            metrics |= {f"{name}{ending}": value for name, value in figures.items()}
        loop.end_epoch(metrics)  # cloud: keeps last/ and best/
        logger.info("epoch %d: %s", epoch, ", ".join(f"{name} {metrics[name]:.4f}" for name in metrics))
    accelerator.end_training()
    return metrics


def as_tensors(data: DatasetDict, task: Task) -> DatasetDict:
    """Keep only the columns that a model accepts: drop the text, and rename `label` to `labels`."""
    columns = next(iter(data.values())).column_names
    data = data.remove_columns([name for name in (*task.sentence_keys, "idx") if name in columns])
    data = data.rename_column("label", "labels")
    data.set_format("torch")
    return data


def make_dataloaders(
    args: argparse.Namespace, task: Task, data: DatasetDict, tokenizer: PreTrainedTokenizerBase
) -> tuple[DataLoader, dict[str, DataLoader]]:
    """Return the training loader, and the validation loaders by the suffix of their metrics (`_mm` for the second of mnli)."""
    for split in ("train", task.validation_splits[0]):
        if split not in data:
            raise ValueError(f"The data has no '{split}' split, only {', '.join(data)}. Add it.")
    collator = DataCollatorWithPadding(tokenizer)
    train = DataLoader(
        data["train"], shuffle=True, collate_fn=collator, batch_size=args.per_device_train_batch_size
    )
    found = {
        ending: DataLoader(data[name], collate_fn=collator, batch_size=args.per_device_eval_batch_size)
        for name, ending in zip(task.validation_splits, ("", "_mm"), strict=False)
        if name in data
    }
    return train, found


@torch.no_grad()
def evaluate_on(
    dataloader: DataLoader, accelerator: Accelerator, loop: TrainLoop, model: torch.nn.Module, task_name: str
) -> dict[str, float]:
    """Return the loss and the official metrics over all rows; the same on every process."""
    metric = evaluate.load(METRIC, task_name, keep_in_memory=True)
    losses = []
    for batch in loop.eval_batches(dataloader):
        outputs = model(**batch)
        # gather_for_metrics drops the rows that pad the last batch.
        logits, labels, loss = accelerator.gather_for_metrics(
            (outputs.logits, batch["labels"], outputs.loss.repeat(len(batch["labels"])))
        )
        losses.append(loss.cpu())
        metric.add_batch(
            predictions=outcome(logits.cpu().numpy(), TASKS[task_name]), references=labels.cpu().numpy()
        )
    figures: dict[str, float] = metric.compute()
    return {"loss": float(np.concatenate(losses).mean()), **figures}


def split(args: argparse.Namespace) -> tuple[DataArguments, ModelArguments]:
    """Return the options that run_glue.py has too, in its form."""
    given = vars(args)
    return tuple(  # type: ignore[return-value]
        kind(**{field.name: given[field.name] for field in fields(kind) if field.name in given})
        for kind in (DataArguments, ModelArguments)
    )


def warn_if_alone() -> None:
    """Warn if `accelerate launch` started only one process: without --multi_gpu it does so silently on a CPU."""
    if {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= os.environ.keys() and "WORLD_SIZE" not in os.environ:
        logger.warning(
            "accelerate launch was asked for several processes and started only this one. Add --multi_gpu, which "
            "works on a CPU too."
        )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--task_name", default="mrpc", type=str.lower, help=f"the GLUE task: {', '.join(TASKS)}")
    add("--dataset_dir", help="folder with train and validation files (parquet, jsonl or csv)")
    add(
        "--model_name_or_path",
        help="a Hub model or a folder; default: a small BERT with new weights",
    )
    add("--run_url", help="URL of the run; default: HF_CLOUDTRAIN_RUN_URL, or runs/<task>")  # cloud:
    add("--output_dir", help="local folder; default: output/<name of the run>")
    add("--num_train_epochs", type=int, default=3)
    add("--per_device_train_batch_size", type=int, default=16)
    add("--per_device_eval_batch_size", type=int, default=32)
    add("--gradient_accumulation_steps", type=int, default=1)
    add("--learning_rate", type=float, help="default: 5e-5, or 5e-4 for the small BERT")
    add("--weight_decay", type=float, default=0.0)
    add("--lr_scheduler_type", choices=[kind.value for kind in SchedulerType], default="linear")
    add("--num_warmup_steps", type=int, default=0)
    add("--seed", type=int, default=42, help="of the weights and the order of the data")
    add("--save_steps", type=int, default=100, help="steps between checkpoints")
    add(
        "--stop_after_steps", type=int, help="stop at this step; the same command without this option resumes"
    )
    add("--logging_steps", type=int, default=20)
    add(
        "--metric_for_best_model",
        default="loss",
        help="the metric that chooses best/: loss, accuracy, f1 ...",
    )
    add("--max_seq_length", type=int, default=128, help="truncate inputs to this many tokens")
    add("--max_train_samples", type=int, help="train on the first N rows only")
    add("--max_eval_samples", type=int, help="evaluate on the first N rows only")
    add("--cache_dir", help="folder for downloaded models and datasets")
    args = parser.parse_args(argv)
    if args.task_name not in TASKS:
        parser.error(f"--task_name '{args.task_name}' is not a GLUE task. Choose one of {', '.join(TASKS)}.")
    if args.learning_rate is None:
        args.learning_rate = 5e-5 if args.model_name_or_path else SMALL_BERT_LEARNING_RATE
    args.run_url = args.run_url or os.getenv("HF_CLOUDTRAIN_RUN_URL", f"runs/{args.task_name}")  # cloud:
    return args


if __name__ == "__main__":
    main()
