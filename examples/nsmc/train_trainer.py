"""Train on NSMC with `Trainer`. The lines marked `# cloud:` are all that hf_cloudtrain adds.

    python examples/nsmc/train_trainer.py --data_dir nsmc --run_url s3://bucket/runs/nsmc
    python examples/nsmc/train_trainer.py --data_dir nsmc --subset 20000               # one minute, no run
    python examples/nsmc/train_trainer.py --data_dir nsmc --model monologg/koelectra-small-v3-discriminator --learning_rate 5e-5

All options of `TrainingArguments` work too. train_loop.py trains the same model in a loop on Accelerate.
"""

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from nsmc_data import LengthGroupedSampler, Splits, load_splits
from nsmc_model import BATCH_SIZE, EPOCHS, LEARNING_RATE, MAX_LENGTH, WARMUP, load_pretrained, make_model
from nsmc_tokenizer import check_vocabulary, encode, make_tokenizer
from torch.utils.data import Dataset, Sampler
from transformers import EvalPrediction, HfArgumentParser, Trainer, TrainingArguments, set_seed

from hf_cloudtrain import CloudTrainCallback  # cloud: the import

DEFAULTS = {
    "output_dir": "nsmc-output",
    "num_train_epochs": EPOCHS,
    "per_device_train_batch_size": BATCH_SIZE,
    "per_device_eval_batch_size": 256,
    "learning_rate": LEARNING_RATE,
    "warmup_steps": WARMUP,
    "eval_strategy": "steps",
    "eval_steps": 500,
    "save_steps": 500,
    "save_total_limit": 2,
    "logging_steps": 50,
    "metric_for_best_model": "accuracy",
    "load_best_model_at_end": True,
    "report_to": "none",
    "dataloader_pin_memory": torch.cuda.is_available(),
    # Without this, processes that torchrun starts on a machine without an accelerator all train as rank 0.
    "use_cpu": not torch.accelerator.is_available(),
    "ddp_find_unused_parameters": False,
}
"""Changed defaults of TrainingArguments, so that the script reaches the accuracy in README.md without options."""


@dataclass
class NsmcArguments:
    """The data, and the URL of the run."""

    data_dir: str = field(metadata={"help": "Folder with ratings_{train,test}.txt or {train,test}*.parquet."})
    subset: int | None = field(
        default=None, metadata={"help": "Train on N reviews only, test on a third of N."}
    )
    max_length: int = field(default=MAX_LENGTH, metadata={"help": "Truncate reviews to this many tokens."})
    model: str | None = field(
        default=None, metadata={"help": "Fine-tune this model of the Hub, or of a folder."}
    )
    run_url: str | None = field(default=None, metadata={"help": "Such as s3://bucket/nsmc"})  # cloud: option


class NsmcTrainer(Trainer):
    """Trainer with batches of similar length, in an order that is the same after a resume.

    Trainer's own `group_by_length` draws the order from the current random state, which differs after a resume.
    """

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int]:
        rows = self.train_dataset if train_dataset is None else train_dataset
        return LengthGroupedSampler(
            list(map(len, rows["input_ids"])), self.args.train_batch_size, self.args.seed
        )


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, and test the best model. Return the metrics of the test."""
    nsmc_args, args = parse(argv)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    set_seed(args.seed)

    reviews = load_splits(nsmc_args.data_dir, subset=nsmc_args.subset, seed=args.seed)
    if nsmc_args.model:
        model, tokenizer = load_pretrained(nsmc_args.model, nsmc_args.max_length)
    else:
        tokenizer = make_tokenizer(reviews.train["document"], nsmc_args.max_length)
        model = make_model(tokenizer, nsmc_args.max_length)
    data = Splits(*(encode(rows, tokenizer) for rows in reviews))

    run_url = nsmc_args.run_url or os.getenv("HF_CLOUDTRAIN_RUN_URL")  # cloud: without it a local run
    cloud = CloudTrainCallback(run_url) if run_url else None  # cloud: one line to name the run
    trainer = NsmcTrainer(
        model=model,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.validation,
        compute_metrics=compute_metrics,
        processing_class=tokenizer,
        callbacks=[cloud] if cloud else None,  # cloud: tracks steps and uploads checkpoints
    )
    checkpoint = args.resume_from_checkpoint
    checkpoint = cloud.restore(args) if cloud else checkpoint  # cloud: None on the first start
    check_vocabulary(checkpoint, tokenizer)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(str(Path(args.output_dir, "best")))
    metrics = trainer.evaluate(data.test, metric_key_prefix="test")
    trainer.log_metrics("test", metrics)
    trainer.save_metrics("test", metrics)
    return metrics


def parse(argv: list[str] | None = None) -> tuple[NsmcArguments, TrainingArguments]:
    # "resolve": TrainingArguments of transformers before 5.15 has a `logging_dir` too.
    parser = HfArgumentParser(
        (NsmcArguments, TrainingArguments), description=__doc__, conflict_handler="resolve"
    )
    parser.set_defaults(**DEFAULTS)
    nsmc_args, args = parser.parse_args_into_dataclasses(argv)
    return nsmc_args, args


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((np.argmax(prediction.predictions, axis=-1) == prediction.label_ids).mean())}


if __name__ == "__main__":
    main()
