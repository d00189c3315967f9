"""Fine-tune a model on a GLUE task with `Trainer`. The lines marked `# cloud:` are all that hf_cloudtrain adds.

The first command trains a small BERT on synthetic data and downloads nothing. The second fine-tunes a pretrained model on MRPC;
the same command on any machine resumes the run:

    python examples/glue/run_glue.py
    torchrun --nproc_per_node 2 examples/glue/run_glue.py --task_name mrpc --model_name_or_path bert-base-uncased \
        --run_url s3://bucket/runs/mrpc

All options of `TrainingArguments` work too.
"""

import logging
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import evaluate
import numpy as np
import torch
from datasets import Dataset, DatasetDict
from glue_synthetic import make_dataset
from glue_tasks import TASKS, Task, load_hub, load_local
from small_bert import make_config, make_model, make_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_cloudtrain import CloudTrainCallback  # cloud: the import

logger = logging.getLogger(__name__)

METRIC = str(Path(__file__).parent / "glue_metric.py")
DEFAULTS = {
    "output_dir": "glue-output",
    "do_train": True,
    "do_eval": True,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 32,
    "logging_steps": 20,
    "save_steps": 100,
    "report_to": "none",
    "dataloader_pin_memory": torch.cuda.is_available(),
    # Without this, processes that torchrun starts on a machine without an accelerator all train as rank 0.
    "use_cpu": not torch.accelerator.is_available(),
    "ddp_find_unused_parameters": False,
}
"""Changed defaults of TrainingArguments, so that the script runs on a laptop without options."""
SMALL_BERT_LEARNING_RATE = 5e-4
"""New weights need a higher learning rate than the 5e-5 that suits a pretrained model."""


@dataclass
class DataArguments:
    """The data."""

    task_name: str = field(default="mrpc", metadata={"help": f"The GLUE task: {', '.join(TASKS)}."})
    dataset_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder with train, validation and test files (parquet, jsonl or csv) in the hub's columns."
        },
    )
    max_seq_length: int = field(default=128, metadata={"help": "Truncate inputs to this many tokens."})
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "Pad to max_seq_length, not to the longest input of a batch."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first N rows only."})
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on the first N rows only."}
    )
    max_predict_samples: int | None = field(default=None, metadata={"help": "Predict the first N rows only."})

    def __post_init__(self) -> None:
        self.task_name = self.task_name.lower()
        if self.task_name not in TASKS:
            raise ValueError(
                f"--task_name '{self.task_name}' is not a GLUE task. Choose one of {', '.join(TASKS)}."
            )


@dataclass
class ModelArguments:
    """The model, and where to store things."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A Hub model or a folder. Without it: a small BERT with new weights."},
    )
    vocab_size: int = field(
        default=0, metadata={"help": "Least number of word embeddings of the small BERT."}
    )
    cache_dir: str | None = field(
        default=None, metadata={"help": "Folder for downloaded models and datasets."}
    )
    logging_dir: str | None = field(
        default=None, metadata={"help": "Folder of the TensorBoard logs (TENSORBOARD_LOGGING_DIR)."}
    )
    run_url: str | None = field(default=None, metadata={"help": "Such as s3://bucket/mrpc."})  # cloud: option


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, evaluate and predict as the options say. Return the metrics of the evaluation."""
    data_args, model_args, args = parse(argv)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logger.setLevel(logging.INFO if args.process_index == 0 else logging.WARNING)
    set_seed(args.seed)

    task = TASKS[data_args.task_name]
    with args.main_process_first(desc="loading the data"):
        raw = load_data(data_args, model_args)
    model, tokenizer = load_model(data_args, model_args, task, raw)
    with args.main_process_first(desc="tokenizing"):
        data = tokenize(raw, tokenizer, data_args, task)

    run_url = model_args.run_url or os.getenv("HF_CLOUDTRAIN_RUN_URL")  # cloud: without it a local run
    cloud = CloudTrainCallback(run_url) if run_url else None  # cloud: one line to name the run
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=pick(data, ("train",), "--do_train") if args.do_train else None,
        eval_dataset=pick(data, task.validation_splits, "--do_eval") if args.do_eval else None,
        compute_metrics=make_compute_metrics(data_args.task_name, task),
        processing_class=tokenizer,
        callbacks=[cloud] if cloud else None,  # cloud: tracks steps and uploads checkpoints
    )

    final_dir = os.path.join(args.output_dir, "final")
    if args.do_train:
        checkpoint = args.resume_from_checkpoint
        checkpoint = cloud.restore(args) if cloud else checkpoint  # cloud: None on the first start
        result = trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model(final_dir)
        record(trainer, "train", result.metrics | {"train_samples": len(data["train"])})
        trainer.save_state()
    metrics = evaluate_all(trainer, data, task) if args.do_eval else {}
    if args.do_predict:
        predict_all(trainer, data, task, data_args.task_name)
    if cloud and args.do_train:  # cloud: the final model ...
        cloud.save(final_dir, name="final")  # cloud: ... is committed like a checkpoint
    return metrics


def parse(argv: list[str] | None = None) -> tuple[DataArguments, ModelArguments, TrainingArguments]:
    argv = sys.argv[1:] if argv is None else argv
    # "resolve": TrainingArguments of transformers before 5.15 has a `logging_dir` too.
    parser = HfArgumentParser(
        (DataArguments, ModelArguments, TrainingArguments), description=__doc__, conflict_handler="resolve"
    )
    parser.set_defaults(**DEFAULTS)
    if parser.parse_known_args(argv)[0].model_name_or_path is None:
        parser.set_defaults(learning_rate=SMALL_BERT_LEARNING_RATE)
    data_args, model_args, args = parser.parse_args_into_dataclasses(argv)
    if model_args.logging_dir:
        # TrainingArguments dropped `logging_dir`: TensorBoardCallback reads this variable when it is created.
        os.environ["TENSORBOARD_LOGGING_DIR"] = model_args.logging_dir
        warnings.warn(
            f"--logging_dir '{model_args.logging_dir}' was stored in the environment variable TENSORBOARD_LOGGING_DIR, because "
            "TrainingArguments dropped the option. Only --report_to tensorboard uses it.",
            stacklevel=2,
        )
    return data_args, model_args, args


def load_data(data_args: DataArguments, model_args: ModelArguments) -> DatasetDict:
    if data_args.dataset_dir:
        return load_local(data_args.task_name, data_args.dataset_dir, model_args.cache_dir)
    if model_args.model_name_or_path:
        return load_hub(data_args.task_name, model_args.cache_dir)
    logger.info("No --dataset_dir and no --model_name_or_path: training a small BERT on SYNTHETIC data.")
    return make_dataset(data_args.task_name)


def load_model(
    data_args: DataArguments, model_args: ModelArguments, task: Task, raw: DatasetDict
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    source, cache_dir = model_args.model_name_or_path, model_args.cache_dir
    if source:
        config = AutoConfig.from_pretrained(source, cache_dir=cache_dir)
        tokenizer = AutoTokenizer.from_pretrained(source, cache_dir=cache_dir)
    else:
        texts = (text for key in task.sentence_keys for text in raw["train"][key])
        tokenizer = make_tokenizer(texts, data_args.max_seq_length)
        config = make_config(tokenizer, data_args.max_seq_length, model_args.vocab_size)
    config.num_labels = task.num_labels
    if task.is_regression:
        config.problem_type = "regression"
    else:
        config.id2label = dict(enumerate(task.labels))
        config.label2id = {label: at for at, label in enumerate(task.labels)}
    if source:
        model = AutoModelForSequenceClassification.from_pretrained(source, config=config, cache_dir=cache_dir)
    else:
        model = make_model(config)
    # The loss of a classifier is a mean. Because forward has **kwargs, Trainer would treat it as a sum over the labels of all
    # processes and multiply it by their number.
    model.accepts_loss_kwargs = False
    return model, tokenizer


def tokenize(
    raw: DatasetDict, tokenizer: PreTrainedTokenizerBase, data_args: DataArguments, task: Task
) -> DatasetDict:
    limit = min(data_args.max_seq_length, tokenizer.model_max_length)

    def preprocess(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return tokenizer(
            *(rows[key] for key in task.sentence_keys),
            padding="max_length" if data_args.pad_to_max_length else False,
            max_length=limit,
            truncation=True,
        )

    most = {"train": data_args.max_train_samples, "validation": data_args.max_eval_samples}
    most["test"] = data_args.max_predict_samples
    for split, rows in raw.items():
        kept = most[split.split("_")[0]]
        raw[split] = rows if kept is None else rows.select(range(min(kept, len(rows))))
    return raw.map(preprocess, batched=True, desc="tokenizing")


def pick(data: DatasetDict, splits: tuple[str, ...], option: str) -> Dataset:
    """Return the first of `splits` that the data has."""
    for split in splits:
        if split in data:
            return data[split]
    raise ValueError(
        f"The data has no '{splits[0]}' split, only {', '.join(data)}. Add it, or pass {option} false."
    )


def make_compute_metrics(task_name: str, task: Task) -> Callable[[EvalPrediction], dict[str, float]]:
    metric = evaluate.load(METRIC, task_name, keep_in_memory=True)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        figures: dict[str, float] = metric.compute(
            predictions=outcome(prediction.predictions, task), references=prediction.label_ids
        )
        if len(figures) > 1:
            figures["combined_score"] = float(np.mean(list(figures.values())))
        return figures

    return compute_metrics


def outcome(predictions: np.ndarray | tuple[np.ndarray, ...], task: Task) -> np.ndarray:
    """Return class ids, or scores if the task is a regression."""
    scores = predictions[0] if isinstance(predictions, tuple) else predictions
    return np.squeeze(scores, axis=-1) if task.is_regression else np.argmax(scores, axis=-1)


def evaluate_all(trainer: Trainer, data: DatasetDict, task: Task) -> dict[str, float]:
    """Return the metrics of all validation splits; those of the second split of mnli end in `_mm`."""
    combined: dict[str, float] = {}
    for split, ending in zip(task.validation_splits, ("", "_mm"), strict=False):
        if split in data:
            metrics = trainer.evaluate(data[split]) | {"eval_samples": len(data[split])}
            combined |= {name if name == "epoch" else f"{name}{ending}": metrics[name] for name in metrics}
    record(trainer, "eval", combined)
    return combined


def predict_all(trainer: Trainer, data: DatasetDict, task: Task, task_name: str) -> None:
    """Write `predict_<split>_<task>.tsv`: the index of each row and the predicted class or score."""
    for split in task.test_splits:
        if split not in data:
            continue
        rows = data[split].remove_columns([name for name in ("label",) if name in data[split].column_names])
        results = outcome(trainer.predict(rows, metric_key_prefix="predict").predictions, task)
        if trainer.is_world_process_zero():
            shown = (f"{item:.3f}" if task.is_regression else task.labels[item] for item in results)
            lines = ["index\tprediction", *(f"{at}\t{item}" for at, item in enumerate(shown))]
            Path(trainer.args.output_dir, f"predict_{split}_{task_name}.tsv").write_text(
                "\n".join(lines) + "\n"
            )


def record(trainer: Trainer, split: str, metrics: dict[str, float]) -> None:
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics)


if __name__ == "__main__":
    main()
