"""The data: rows of a text and a label, from your files or SYNTHETIC ones."""

from __future__ import annotations

import csv
import json
import random
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Row = tuple[str, str]
"""A text and the name of its label."""


class TextDataset(Dataset[dict[str, Any]]):
    """Rows as token ids and label numbers.

    Args:
        rows: texts and labels.
        tokenizer: cuts texts that are too long; the collator pads them to the longest of a batch.
        labels: all names; the number of a label is its index.
    """

    def __init__(self, rows: list[Row], tokenizer: PreTrainedTokenizerFast, labels: list[str]) -> None:
        unknown = sorted({label for _, label in rows} - set(labels))
        if unknown:
            raise SystemExit(f"The training data has no row with the label {unknown[0]!r}.")
        self.encoded = tokenizer([text for text, _ in rows], truncation=True)
        self.labels = [labels.index(label) for _, label in rows]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "input_ids": self.encoded["input_ids"][index],
            "attention_mask": self.encoded["attention_mask"][index],
            "labels": self.labels[index],
        }


def read_rows(path: str) -> list[Row]:
    """Return the rows of a file with the fields `text` and `label`: CSV with a header, or JSON lines."""
    if not path.endswith((".csv", ".json", ".jsonl")):
        raise SystemExit(f"{path!r} must end in .csv, .json or .jsonl (JSON lines).")
    rows: list[Row] = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            records = csv.DictReader(file) if path.endswith(".csv") else map(_decode, filter(str.strip, file))
            for record in records:
                rows.append(_row(record, f"Row {len(rows) + 1} of {path!r}"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SystemExit(f"{path!r} cannot be read: {error}") from None
    if not rows:
        raise SystemExit(f"{path!r} has no rows.")
    return rows


def synthetic_rows(size: int, seed: int) -> list[Row]:
    """Return rows of 15 letters, labelled by the half of the alphabet that most of them come from.

    The same seed gives the same rows, in each process and after each restart.
    """
    generator = random.Random(seed)
    texts = [generator.choices("abcdefghijklmnopqrstuvwxyz", k=15) for _ in range(size)]
    return [
        (" ".join(letters), "first half" if sum(letter <= "m" for letter in letters) > 7 else "second half")
        for letters in texts
    ]


def _decode(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _row(record: Any, where: str) -> Row:
    if not isinstance(record, dict):
        raise SystemExit(f"{where} is not a JSON object.")
    text, label = record.get("text"), record.get("label")
    if text is None or label is None or label == "":
        found = ", ".join(repr(name) for name in record) or "none"
        raise SystemExit(f"{where} needs the fields 'text' and 'label'; its fields: {found}.")
    return str(text), str(label)
