"""Train the model in `model/`. The same command on any machine resumes the run.

python train.py                                     # checkpoints in the folder runs/first
python train.py --run_url s3://bucket/runs/first    # checkpoints on storage
python train.py --train_file train.csv --validation_file valid.csv    # your data: csv or JSON lines with text and label
torchrun --nproc_per_node 2 train.py                # two processes; or: accelerate launch train.py
"""

from __future__ import annotations

import argparse
import os

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from model.configuration import ClassifierConfig
from model.dataset import TextDataset, read_rows, synthetic_rows
from model.modeling import Classifier
from model.tokenizer import build_tokenizer
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding

from hf_cloudtrain import TrainLoop


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    set_seed(args.seed)
    # Without `cpu`, processes on a machine without an accelerator train independently of each other.
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())

    if args.train_file:
        train_rows, eval_rows = read_rows(args.train_file), read_rows(args.validation_file)
    else:
        train_rows, eval_rows = synthetic_rows(2000, seed=1), synthetic_rows(400, seed=2)
    tokenizer = build_tokenizer([text for text, _ in train_rows])
    labels = sorted({label for _, label in train_rows})
    train_dataset, eval_dataset = (TextDataset(rows, tokenizer, labels) for rows in (train_rows, eval_rows))
    collator = DataCollatorWithPadding(tokenizer)

    config = ClassifierConfig(
        vocab_size=len(tokenizer),
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
    )
    model = Classifier(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    model, optimizer, train_dataloader, eval_dataloader = accelerator.prepare(
        model,
        optimizer,
        DataLoader(train_dataset, batch_size=args.batch_size, shuffle=True, collate_fn=collator),
        DataLoader(eval_dataset, batch_size=args.batch_size, collate_fn=collator),
    )

    loop = TrainLoop(
        accelerator,
        args.run_url,
        num_epochs=args.num_epochs,
        save_steps=args.save_steps,
        output_dir=args.output_dir,
        processing_class=tokenizer,
        metric_for_best_model="accuracy",
        log_format="epochs",
        script_args=vars(args),
    )
    for _epoch in loop.epochs():
        model.train()
        for batch in loop.steps(train_dataloader):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            loop.log(loss=loss)
        loop.end_epoch(evaluate(accelerator, loop, model, eval_dataloader))
    accelerator.print(
        f"Best accuracy: {loop.best_metric:.3f}. The models are in {loop.output_dir}/best and last."
    )
    accelerator.end_training()


@torch.no_grad()
def evaluate(
    accelerator: Accelerator, loop: TrainLoop, model: torch.nn.Module, dataloader: DataLoader
) -> dict[str, float]:
    """Return loss and accuracy over all rows; the same on every process."""
    model.eval()
    losses, hits = [], []
    for batch in loop.eval_batches(dataloader):
        labels = batch.pop("labels")
        # gather_for_metrics drops the rows that pad the last batch.
        logits, labels = accelerator.gather_for_metrics((model(**batch).logits, labels))
        losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
        hits.append(logits.argmax(dim=-1) == labels)
    return {"loss": torch.cat(losses).mean().item(), "accuracy": torch.cat(hits).float().mean().item()}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run_url",
        default=os.getenv("HF_CLOUDTRAIN_RUN_URL", "runs/first"),
        help="URL of the run: s3://, gs://, az:// or a folder (default: %(default)s)",
    )
    parser.add_argument("--train_file", help=".csv, .json or .jsonl (default: synthetic data)")
    parser.add_argument("--validation_file", help="the same for the evaluation")
    parser.add_argument("--output_dir", help="local folder (default: output/<name of the run>)")
    parser.add_argument("--num_epochs", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=16, help="for each process (default: %(default)s)")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--save_steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args(argv)
    if (args.train_file is None) != (args.validation_file is None):
        parser.error("--train_file and --validation_file must be given together")
    return args


if __name__ == "__main__":
    main()
