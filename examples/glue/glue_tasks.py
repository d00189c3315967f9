"""The nine GLUE tasks: their columns and labels, and how to load their data from a folder or the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, DatasetDict, Features, Value, load_dataset

HUB_DATASET = "nyu-mll/glue"
BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}


@dataclass(frozen=True)
class Task:
    """Columns, labels and splits of one task."""

    sentence_keys: tuple[str, ...]
    """The columns with the text: one, or two for a pair."""
    labels: tuple[str, ...]
    """Class names in the order of the label ids; empty for a regression (stsb: a score from 0 to 5)."""
    validation_splits: tuple[str, ...] = ("validation",)
    test_splits: tuple[str, ...] = ("test",)

    @property
    def is_regression(self) -> bool:
        return not self.labels

    @property
    def num_labels(self) -> int:
        return len(self.labels) or 1

    @property
    def splits(self) -> tuple[str, ...]:
        return ("train", *self.validation_splits, *self.test_splits)


TASKS = {
    "cola": Task(("sentence",), ("unacceptable", "acceptable")),
    "mnli": Task(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        ("validation_matched", "validation_mismatched"),
        ("test_matched", "test_mismatched"),
    ),
    "mrpc": Task(("sentence1", "sentence2"), ("not_equivalent", "equivalent")),
    "qnli": Task(("question", "sentence"), ("entailment", "not_entailment")),
    "qqp": Task(("question1", "question2"), ("not_duplicate", "duplicate")),
    "rte": Task(("sentence1", "sentence2"), ("entailment", "not_entailment")),
    "sst2": Task(("sentence",), ("negative", "positive")),
    "stsb": Task(("sentence1", "sentence2"), ()),
    "wnli": Task(("sentence1", "sentence2"), ("not_entailment", "entailment")),
}


def load_hub(task_name: str, cache_dir: str | None = None) -> DatasetDict:
    return load_dataset(HUB_DATASET, task_name, cache_dir=cache_dir)


def load_local(task_name: str, folder: str, cache_dir: str | None = None) -> DatasetDict:
    """Load the splits in `folder`, with the columns of the Hub dataset, whatever the file format.

    A split is made of the files whose name starts with the split's name: `train.parquet`, `train-00000-of-00002.parquet`,
    `validation_matched.csv`.
    """
    if not Path(folder).is_dir():
        raise NotADirectoryError(f"--dataset_dir '{folder}' is not a folder.")
    task = TASKS[task_name]
    found = {split: _files(Path(folder), split) for split in task.splits}
    if not any(found.values()):
        raise FileNotFoundError(
            f"--dataset_dir '{folder}' has no file for '{task_name}'. Expected {', '.join(task.splits)} "
            f"with one of the suffixes {', '.join(BUILDERS)}."
        )
    return DatasetDict({split: _read(task, files, cache_dir) for split, files in found.items() if files})


def _files(folder: Path, split: str) -> list[Path]:
    files = [path for path in sorted(folder.glob(f"{split}*")) if path.suffix in BUILDERS]
    if len({path.suffix for path in files}) > 1:
        names = ", ".join(path.name for path in files)
        raise ValueError(
            f"--dataset_dir '{folder}' has '{split}' in more than one format ({names}). Keep one."
        )
    return files


def _read(task: Task, files: list[Path], cache_dir: str | None) -> Dataset:
    builder = BUILDERS[files[0].suffix]
    options = {}
    if builder == "csv":
        # Without these, pandas reads the sentence "NA" as missing and the sentence "007" as the number 7.
        options = {"converters": dict.fromkeys(task.sentence_keys, str), "keep_default_na": False}
    names = [str(path) for path in files]
    dataset = load_dataset(builder, data_files=names, split="train", cache_dir=cache_dir, **options)
    missing = [key for key in task.sentence_keys if key not in dataset.column_names]
    if missing:
        raise ValueError(
            f"'{files[0]}' has no column '{missing[0]}', only {', '.join(dataset.column_names)}."
        )
    columns = {key: Value("string") for key in task.sentence_keys}
    columns |= {"label": Value("float32" if task.is_regression else "int64"), "idx": Value("int32")}
    kept = {name: value for name, value in columns.items() if name in dataset.column_names}
    return dataset.select_columns(list(kept)).cast(Features(kept))
