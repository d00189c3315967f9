"""A sampler that continues where training stopped, on any number of processes."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch.utils.data import Sampler

from hf_cloudtrain.errors import ConfigurationError, PositionError
from hf_cloudtrain.runtime.ranks import rank_and_size

_KEYS = ("seed", "epoch", "samples_seen", "length", "shuffle")


class ResumableSampler(Sampler[int]):
    """Distributes the indices of a dataset to the processes of a job, from any position of an epoch.

    The order of an epoch is a permutation by (seed, epoch) alone, the same as DistributedSampler's. The processes take
    turns in it, starting after the samples that were trained on in this epoch. So a resume is exact on a different number of
    processes too, and skipping costs nothing. Only `advance` moves the position, not what workers fetch ahead.

    Args:
        data: a dataset with a length, or the length.
        num_replicas: number of processes; None takes that of torch.distributed, else of the launcher, else 1.
        rank: of this process; None as above.
        shuffle: False keeps the order of the dataset.
        seed: the same on all processes.
        drop_last: leave out the last samples if they do not divide by the processes; else the first of the order fill up.

    Raises:
        ConfigurationError: the rank is out of range, or the dataset is empty.

    Example:
        >>> sampler = ResumableSampler(dataset, seed=42)
        >>> loader = DataLoader(dataset, batch_size=32, sampler=sampler, num_workers=2)
        >>> if folder is not None:
        ...     sampler.load_state_dict(torch.load(f"{folder}/checkpoint.pt")["sampler"])
        >>> for epoch in range(sampler.epoch, 3):
        ...     sampler.set_epoch(epoch)
        ...     for inputs, labels in loader:
        ...         train(inputs, labels)
        ...         sampler.advance(len(labels))
    """

    def __init__(
        self,
        data: Sized | int,
        *,
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        found_rank, found_size = rank_and_size()
        self.num_replicas = found_size if num_replicas is None else num_replicas
        self.rank = found_rank if rank is None else rank
        self.length = data if isinstance(data, int) else len(data)
        if not 0 <= self.rank < self.num_replicas:
            raise ConfigurationError(
                f"rank={self.rank} is out of range for num_replicas={self.num_replicas}. Pass both, or neither."
            )
        if self.length < 1:
            raise ConfigurationError(f"The dataset must not be empty; its length is {self.length}.")
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.epoch = 0
        self.samples_seen = 0
        """Samples of this epoch that all processes together have trained on."""
        self._handed_out = False
        self._advanced = False

    def __iter__(self) -> Iterator[int]:
        if self._advanced and self.samples_seen == self.length:
            raise ConfigurationError(
                f"Epoch {self.epoch} is complete. Call set_epoch({self.epoch + 1}) before you iterate again."
            )
        order = self._order()
        first = self.samples_seen + self.rank
        for position in range(first, first + len(self) * self.num_replicas, self.num_replicas):
            self._handed_out = True
            yield order[position % self.length]

    def __len__(self) -> int:
        """Samples of this epoch that this process has not trained on yet."""
        left = self.length - self.samples_seen
        return (left if self.drop_last else left + self.num_replicas - 1) // self.num_replicas

    def set_epoch(self, epoch: int) -> None:
        """Start an epoch; the current epoch continues at its position."""
        if epoch != self.epoch:
            self.epoch = epoch
            self.samples_seen = 0
            self._handed_out = self._advanced = False

    def advance(self, samples: int) -> None:
        """Note that this process, and each other one, has trained on so many more samples.

        Example:
            >>> sampler.advance(len(batch))
        """
        if samples < 0:
            raise ConfigurationError(
                f"advance({samples}) must not be negative. Pass the number of samples in the batch."
            )
        # The last round may be filled up with samples that were seen.
        self.samples_seen = min(self.length, self.samples_seen + samples * self.num_replicas)
        self._advanced = True

    def state_dict(self) -> dict[str, int]:
        """The position, the same on every process; for the checkpoint.

        Raises:
            PositionError: samples were drawn and `advance` was not called, so the position would be wrong.
        """
        if self._handed_out and not self._advanced:
            raise PositionError(
                "Samples were drawn from the sampler but advance() was not called, so a resumed run would see them again. "
                "Call sampler.advance(len(batch)) after each batch, or advance(0) if none was trained on."
            )
        return {name: getattr(self, name) for name in _KEYS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position.

        Raises:
            PositionError: it belongs to a different dataset or order.
        """
        if not isinstance(state, dict) or any(not isinstance(state.get(name), int) for name in _KEYS):
            raise PositionError(
                f"{state!r} is not a state of a ResumableSampler. Pass what state_dict() returned."
            )
        for name, what in (("length", "dataset"), ("seed", "seed"), ("shuffle", "order")):
            if state[name] != getattr(self, name):
                raise PositionError(
                    f"The position was saved with {name}={state[name]}, but this sampler has {name}={getattr(self, name)}: the "
                    f"samples would differ. Use the same {what}."
                )
        if state["epoch"] < 0 or not 0 <= state["samples_seen"] <= self.length:
            raise PositionError(
                f"{state!r} is not a position in {self.length} samples. Pass what state_dict() returned."
            )
        self.epoch = state["epoch"]
        self.samples_seen = state["samples_seen"]
        self._handed_out = self._advanced = False

    def _order(self) -> list[int]:
        if not self.shuffle:
            return list(range(self.length))
        generator = torch.Generator()
        generator.manual_seed(self.seed + self.epoch)
        order: list[int] = torch.randperm(self.length, generator=generator).tolist()
        return order
