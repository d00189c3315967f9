"""The data: SYNTHETIC rows until you replace them with yours."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset


class MajorityDataset(Dataset[dict[str, torch.Tensor]]):
    """Sequences of symbols, labelled by the half of the alphabet that most of them come from.

    Args:
        size: number of rows.
        seed: the same seed gives the same rows, in each process and after each restart.
        vocab_size: number of symbols in the alphabet.
        length: symbols in a row; an odd number, so that one half has the majority.
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
