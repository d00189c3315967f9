"""The NSMC reviews: reading them, cleaning them, and an order that keeps lengths together.

NSMC (https://github.com/e9t/nsmc) is 200,000 Korean movie reviews of at most 140 characters or so, half of
them good (1), half bad (0). Its files are `ratings_train.txt` and `ratings_test.txt`; hubs have parquet.
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
    ),  # one writing system, with the signs that carry a mood
    (r"(.)(?=\1\1)", ""),  # at most two of the same: ㅋㅋㅋㅋㅋ and ㅋㅋ say one thing
    (r"\s+", " "),
)
"""What is replaced in a review, by what, in this order, once it is composed (NFC) and in lower case.

The tokenizer is made of the same table, so a pattern must mean the same to `re` and to the
regular expressions of `tokenizers` (Oniguruma).
"""

VALIDATION_SHARE = 0.03
"""Of the training reviews; the test reviews are for the figure alone, nothing is chosen by them."""

SHUFFLED_TOGETHER = 50
"""Batches whose samples are sorted by length among each other. Fewer make more padding; more make the batches
of an epoch resemble those of the epoch before."""


class Splits(NamedTuple):
    """The reviews to learn from, those that choose the best epoch, and those that nothing is chosen by."""

    train: Dataset
    validation: Dataset
    test: Dataset


class LengthGroupedSampler(Sampler[int]):
    """Every sample once an epoch, shuffled, in batches of about equal length.

    The order is a function of (seed, epoch) alone, so a run that resumes within an epoch finds the same one.
    Whoever iterates says the epoch first: loaders of accelerate and Trainer call `set_epoch` by themselves.
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
        # The short batch, if there is one, stays last: elsewhere it would shift the edges of all that follow.
        short = [batches.pop()] if batches and len(batches[-1]) < self.batch_size else []
        shuffled = [batches[at] for at in torch.randperm(len(batches), generator=chance).tolist()]
        for batch in [*shuffled, *short]:
            yield from batch.tolist()


def load_splits(folder: str | Path, *, subset: int | None = None, seed: int = 0) -> Splits:
    """The training file, less a share that chooses the best model, and the test file.

    Args:
        folder: has `ratings_train.txt` and `ratings_test.txt`, or `train*.parquet` and `test*.parquet`.
        subset: read only so many training reviews, and a third as many test reviews.
        seed: of which reviews those are, and which are put aside for validation.

    Reviews of which cleaning leaves nothing are dropped from the training file only: nothing can be learnt
    from them, but a score on the test file is a score on all of it.
    """
    train, test = load_file(folder, "train"), load_file(folder, "test")
    train = train.select([at for at, text in enumerate(train["document"]) if clean(text)])
    chosen = _shuffled(len(train), seed)[:subset]
    aside = max(1, round(len(chosen) * VALIDATION_SHARE))
    if len(chosen) <= aside:
        raise ValueError(
            f"{len(chosen)} training reviews of '{folder}': two are the least, one to validate with"
        )
    return Splits(
        train=train.select(sorted(chosen[aside:])),
        validation=train.select(sorted(chosen[:aside])),
        test=test
        if subset is None
        else test.select(sorted(_shuffled(len(test), seed)[: max(1, subset // 3)])),
    )


def load_file(folder: str | Path, split: str) -> Dataset:
    """One split, "train" or "test", as it is in its file: the columns id, document and label.

    Raises:
        FileNotFoundError: the folder has neither form of it.
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
            f"'{folder}' has neither '{raw.name}' nor a '{split}*.parquet': get the files from"
            " https://github.com/e9t/nsmc and name their folder with --data_dir"
        )
    rows = {
        "id": [str(each) for each in ids],
        "document": [text or "" for text in documents],  # eight are empty, which some parquet files call null
        "label": [int(label) for label in labels],
    }
    return Dataset.from_dict(rows)


def read_raw(path: Path) -> Iterator[tuple[str, str, int]]:
    """The rows of a `ratings_*.txt`: a line each; id, review and label with tabs between, and no quoting.

    Raises:
        ValueError: a line that is not a row, with its number.
    """
    with path.open(encoding="utf-8", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            row = line.rstrip("\r\n").split("\t")
            if number == 1 and row == COLUMNS:
                continue
            if len(row) != len(COLUMNS) or row[2] not in {"0", "1"}:
                raise ValueError(
                    f"'{path}' line {number} is not id, document and label with tabs between: '{line[:80]}'"
                )
            yield row[0], row[1], int(row[2])


def clean(text: str) -> str:
    """A review as the tokenizer sees it: composed, in lower case, without what says nothing.

    Example:
        clean("최고ㅋㅋㅋㅋㅋ!!!!  Good")  # '최고ㅋㅋ!! good'
    """
    text = unicodedata.normalize("NFC", text).lower()
    for pattern, replacement in CLEANING:
        text = re.sub(pattern, replacement, text)
    return text.strip()


def _shuffled(size: int, seed: int) -> list[int]:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
