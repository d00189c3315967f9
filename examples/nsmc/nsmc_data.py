"""Read and clean the NSMC reviews, and sample them in batches of similar length.

NSMC (https://github.com/e9t/nsmc) has 200,000 Korean film reviews of at most about 140 characters, half of them positive (1), half
negative (0). Its files are `ratings_train.txt` and `ratings_test.txt`; the Hub has parquet files.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from torch.utils.data import Sampler

LABELS = ("negative", "positive")
COLUMNS = ["id", "document", "label"]

CLEANING = (
    (
        r"[^가-힣ㄱ-ㅎㅏ-ㅣa-z0-9\s!-/:-@\[-`{-~♡♥★☆…]",
        " ",
    ),  # one script, with the symbols that express a mood
    (r"(.)(?=\1\1)", ""),  # at most two repetitions: ㅋㅋㅋㅋㅋ means the same as ㅋㅋ
    (r"\s+", " "),
)
"""Replacements in a review, applied in this order after it is composed (NFC) and lowercased.

The tokenizer uses the same table, so a pattern must have the same meaning for `re` and for the regular expressions of
`tokenizers` (Oniguruma).
"""

VALIDATION_SHARE = 0.03
"""Share of the training reviews. The test reviews are used only for the final accuracy."""

SHUFFLED_TOGETHER = 50
"""Number of batches whose samples are sorted together by length. Fewer cause more padding; more make the batches of an epoch
similar to those of the previous epoch."""


class Splits(NamedTuple):
    """Reviews for training, for choosing the best checkpoint, and for the final test."""

    train: Dataset
    validation: Dataset
    test: Dataset


class LengthGroupedSampler(Sampler[int]):
    """Samples all rows once in an epoch, shuffled, in batches of similar length.

    The order depends only on (seed, epoch), so a run that resumes within an epoch finds the same order. Call `set_epoch` before
    you iterate; the data loaders of Accelerate and Trainer do so.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = torch.as_tensor(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        chance = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=chance)
        batches: list[torch.Tensor] = []
        for part in order.split(self.batch_size * SHUFFLED_TOGETHER):
            sorted_part = part[torch.argsort(self.lengths[part], stable=True)]
            batches += sorted_part.split(self.batch_size)
        # A shorter batch stays last: elsewhere it would shift the boundaries of all later batches.
        short = [batches.pop()] if batches and len(batches[-1]) < self.batch_size else []
        shuffled = [batches[at] for at in torch.randperm(len(batches), generator=chance).tolist()]
        for batch in [*shuffled, *short]:
            yield from batch.tolist()


def load_splits(folder: str | Path, *, subset: int | None = None, seed: int = 0) -> Splits:
    """Split the training file into training and validation reviews, and load the test file.

    Args:
        folder: contains `ratings_train.txt` and `ratings_test.txt`, or `train*.parquet` and `test*.parquet`.
        subset: number of training reviews to use, with a third as many test reviews; None: all.
        seed: chooses the subset and the validation reviews.

    Reviews that are empty after cleaning are dropped from the training file only: the accuracy is measured on the whole test
    file.
    """
    train, test = load_file(folder, "train"), load_file(folder, "test")
    train = train.select([at for at, text in enumerate(train["document"]) if clean(text)])
    chosen = _shuffled(len(train), seed)[:subset]
    aside = max(1, round(len(chosen) * VALIDATION_SHARE))
    if len(chosen) <= aside:
        raise ValueError(
            f"'{folder}' has {len(chosen)} training reviews; at least two are needed, one of them for validation."
        )
    return Splits(
        train=train.select(sorted(chosen[aside:])),
        validation=train.select(sorted(chosen[:aside])),
        test=test
        if subset is None
        else test.select(sorted(_shuffled(len(test), seed)[: max(1, subset // 3)])),
    )


def load_file(folder: str | Path, split: str) -> Dataset:
    """Load one split, "train" or "test", with the columns id, document and label.

    Raises:
        FileNotFoundError: the folder contains neither form of the split.
    """
    raw = Path(folder, f"ratings_{split}.txt")
    parquet = sorted(Path(folder).glob(f"{split}*.parquet"))
    if raw.exists():
        ids, documents, labels = zip(*read_raw(raw), strict=True)
    elif parquet:
        table = pa.concat_tables(pq.read_table(path, columns=COLUMNS) for path in parquet)
        ids, documents, labels = (column.to_pylist() for column in table.columns)
    else:
        raise FileNotFoundError(
            f"'{folder}' contains neither '{raw.name}' nor '{split}*.parquet'. Download the files from "
            "https://github.com/e9t/nsmc and pass their folder as --data_dir."
        )
    rows = {
        "id": [str(each) for each in ids],
        "document": [text or "" for text in documents],  # eight are empty, or null in some parquet files
        "label": [int(label) for label in labels],
    }
    return Dataset.from_dict(rows)


def read_raw(path: Path) -> Iterator[tuple[str, str, int]]:
    """Read the rows of a `ratings_*.txt`: one in a line; id, review and label separated by tabs, without quoting.

    Raises:
        ValueError: a line is not a row; the message has its number.
    """
    with path.open(encoding="utf-8", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            row = line.rstrip("\r\n").split("\t")
            if number == 1 and row == COLUMNS:
                continue
            if len(row) != len(COLUMNS) or row[2] not in {"0", "1"}:
                raise ValueError(
                    f"'{path}' line {number} is not id, document and label separated by tabs: '{line[:80]}'"
                )
            yield row[0], row[1], int(row[2])


def clean(text: str) -> str:
    """Clean a review as the tokenizer does: compose it, lowercase it, and remove what carries no meaning.

    Example:
        clean("최고ㅋㅋㅋㅋㅋ!!!!  Good")  # '최고ㅋㅋ!! good'
    """
    text = unicodedata.normalize("NFC", text).lower()
    for pattern, replacement in CLEANING:
        text = re.sub(pattern, replacement, text)
    return text.strip()


def _shuffled(size: int, seed: int) -> list[int]:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
