"""Batch samplers with the names, arguments and order of PeriFlow's SDK: the position is a number of steps.

Read from https://github.com/friendliai/periflow-python-sdk (periflow_sdk/dataloading/sampler.py).
"""

from __future__ import annotations

import abc
from collections.abc import Iterator

import torch

from hf_cloudtrain.errors import ConfigurationError


class _StepSampler(abc.ABC):
    """The arguments, and the position in steps."""

    def __init__(
        self,
        samples_per_epoch: int,
        batch_size: int,
        drop_last: bool = False,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
    ) -> None:
        if batch_size < 1 or batch_size % data_parallel_size:
            raise ConfigurationError(
                f"batch_size={batch_size} must be a multiple of data_parallel_size={data_parallel_size}: it counts the samples "
                "of all processes."
            )
        if samples_per_epoch % data_parallel_size and not drop_last:
            raise ConfigurationError(
                f"samples_per_epoch={samples_per_epoch} must be a multiple of data_parallel_size={data_parallel_size}, or some "
                "samples would be seen twice. Pass drop_last=True."
            )
        if not 0 <= data_parallel_rank < data_parallel_size:
            raise ConfigurationError(
                f"data_parallel_rank={data_parallel_rank} is out of range for data_parallel_size={data_parallel_size}."
            )
        self._samples = samples_per_epoch
        self._batch_size = batch_size
        self._drop_last = drop_last
        self._rank = data_parallel_rank
        self._size = data_parallel_size
        self._steps_per_epoch = (samples_per_epoch + (0 if drop_last else batch_size - 1)) // batch_size
        if self._steps_per_epoch < 1:
            raise ConfigurationError(
                f"An epoch of {samples_per_epoch} samples has no batch of {batch_size}. Use a smaller batch_size."
            )
        self._epoch = 0
        self._first_step = 0
        """Steps of the epoch that are done."""

    def set_processed_steps(self, processed_steps: int) -> None:
        """Continue after so many steps of the whole training.

        With `drop_last` an epoch has whole batches only; PeriFlow counted one more, and continued at a different sample.

        Example:
            >>> sampler.set_processed_steps(processed_steps())
        """
        if processed_steps < 0:
            raise ConfigurationError(f"processed_steps={processed_steps} must not be negative.")
        self._epoch, self._first_step = divmod(processed_steps, self._steps_per_epoch)

    def __len__(self) -> int:
        """Samples of an epoch, as in PeriFlow: not batches."""
        return self._samples

    def __iter__(self) -> Iterator[list[int]]:
        """The batches of this process, from the position to the end of the epoch; then the next epoch begins."""
        order = self._order()
        for step in range(self._first_step, self._steps_per_epoch):
            yield self._batch(order, step)
        self._epoch += 1
        self._first_step = 0

    @abc.abstractmethod
    def _order(self) -> list[int]:
        """The samples in the order of this epoch."""

    @abc.abstractmethod
    def _batch(self, order: list[int], step: int) -> list[int]:
        """The samples of this process in one step."""


class ResumableSequentialSampler(_StepSampler):
    """PeriFlow's sampler of batches in the order of the dataset, for `DataLoader(batch_sampler=…)`.

    A step takes the next `batch_size` samples, and each process an equal part of them.

    Args:
        samples_per_epoch: length of the dataset.
        batch_size: samples of all processes in a step.
        drop_last: leave out an incomplete last batch.
        data_parallel_rank: of this process.
        data_parallel_size: number of processes.

    Raises:
        ConfigurationError: the samples cannot be divided evenly.

    Example:
        >>> sampler = ResumableSequentialSampler(samples_per_epoch=10, batch_size=4)
        >>> sampler.set_processed_steps(1)
        >>> list(sampler)
        [[4, 5, 6, 7], [8, 9]]
    """

    def _order(self) -> list[int]:
        return list(range(self._samples))

    def _batch(self, order: list[int], step: int) -> list[int]:
        batch = order[step * self._batch_size : (step + 1) * self._batch_size]
        part = len(batch) // self._size
        return batch[self._rank * part : (self._rank + 1) * part]


class ResumableRandomSampler(_StepSampler):
    """PeriFlow's sampler of batches in a random order, which seed and epoch decide, for `DataLoader(batch_sampler=…)`.

    Each process shuffles a part of its own of the dataset. `ResumableSampler` shuffles all of it, and continues on a
    different number of processes.

    Args:
        samples_per_epoch: length of the dataset.
        batch_size: samples of all processes in a step.
        drop_last: leave out an incomplete last batch.
        seed: the same on all processes.
        data_parallel_rank: of this process.
        data_parallel_size: number of processes.

    Raises:
        ConfigurationError: the samples cannot be divided evenly.

    Example:
        >>> sampler = ResumableRandomSampler(samples_per_epoch=len(dataset), batch_size=32, seed=42)
        >>> sampler.set_processed_steps(processed_steps())
        >>> loader = DataLoader(dataset, batch_sampler=sampler)
    """

    def __init__(
        self,
        samples_per_epoch: int,
        batch_size: int,
        drop_last: bool = False,
        seed: int = 0,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
    ) -> None:
        super().__init__(samples_per_epoch, batch_size, drop_last, data_parallel_rank, data_parallel_size)
        self._seed = seed

    def _order(self) -> list[int]:
        generator = torch.Generator()
        generator.manual_seed(self._epoch + self._seed + 1)  # as in PeriFlow, so that the order is the same
        mine = self._samples // self._size
        first = mine * self._rank
        return [first + index for index in torch.randperm(mine, generator=generator).tolist()]

    def _batch(self, order: list[int], step: int) -> list[int]:
        part = self._batch_size // self._size
        return order[step * part : (step + 1) * part]
