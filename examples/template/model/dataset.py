"""The data: SYNTHETIC rows, made on the spot, until yours take their place."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset


class MajorityDataset(Dataset[dict[str, torch.Tensor]]):
    """Sequences of symbols, labelled by which half of the alphabet holds the most of them.

    Args:
        size: number of rows.
        seed: the same rows for the same seed, in every process and after every restart.
        vocab_size: how many symbols there are.
        length: symbols in a row; an odd number, so that one half always has more.
    """

    def __init__(self, size: int, seed: int, vocab_size: int = 32, length: int = 15) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.input_ids = torch.randint(vocab_size, (size, length), generator=generator)
        in_upper_half = (self.input_ids >= vocab_size // 2).sum(dim=1)
        self.labels = (in_upper_half > length // 2).long()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.input_ids[index], "labels": self.labels[index]}
