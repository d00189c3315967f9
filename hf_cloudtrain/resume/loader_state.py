"""The position that a stream or a DataLoader keeps itself, with `state_dict` and `load_state_dict`."""

from __future__ import annotations

from typing import Any

from torch.utils.data import IterableDataset

from hf_cloudtrain.errors import ConfigurationError, ManifestError
from hf_cloudtrain.resume.dataloaders import (
    BY_INDEX,
    BY_READING,
    BY_STATE,
    fills_up,
    is_dispatcher,
    keeps_state,
    reads_here,
    shuffles_in_a_buffer,
)
from hf_cloudtrain.resume.watched_sampler import Fetch


class LoaderState:
    """How a resume reaches a batch of this DataLoader, and the state that it needs for that."""

    def __init__(self, dataloader: Any) -> None:
        self._dataloader = dataloader
        self._base = getattr(dataloader, "base_dataloader", dataloader)
        self.way = self._way()
        """`BY_INDEX`, `BY_STATE` or `BY_READING`."""

    @property
    def observed_stream(self) -> Any:
        """The dataset whose state is read before each fetch; None if there is none."""
        return self._stream() if self.way == BY_STATE and not keeps_state(self._dataloader) else None

    @property
    def inexact_reason(self) -> str | None:
        """Why a resume within an epoch cannot be exact; None if it can."""
        if self.way == BY_STATE and fills_up(self._dataloader):
            return "the last batch of a dispatched stream is filled up with its first one, which a resume does not read"
        return None

    def capture(self, fetch: Fetch | None) -> Any:
        """The state before the next fetch, for a file; `fetch` is what was noted then, None if it has not started."""
        if self.way != BY_STATE or not reads_here(self._dataloader):
            return None
        if keeps_state(self._dataloader):
            return storable(self._dataloader.state_dict())
        return storable(self._stream().state_dict() if fetch is None else fetch.stream)

    def restore(self, state: Any) -> None:
        """Set what `capture` returned."""
        if not reads_here(self._dataloader):
            return
        if state is None:
            raise ManifestError("The position in the stream is missing from the checkpoint.")
        owner = self._dataloader if keeps_state(self._dataloader) else self._stream()
        owner.load_state_dict(state)

    def _way(self) -> str:
        if not isinstance(self._base.dataset, IterableDataset):
            # A dispatcher fills the last batch up with the first one that it has read.
            return BY_READING if is_dispatcher(self._dataloader) else BY_INDEX
        if keeps_state(self._dataloader) or (self._stream() is not None and self._base.num_workers == 0):
            return BY_STATE
        return BY_READING

    def _stream(self) -> Any:
        """The dataset that can save and restore its position exactly; None if there is none."""
        dataset = self._base.dataset
        if type(dataset).__name__ == "IterableDatasetShard":
            if not dataset.drop_last:
                return None  # its last batch is filled up with its first one, which a resume does not read
            dataset = dataset.dataset
        if not (hasattr(dataset, "state_dict") and hasattr(dataset, "load_state_dict")):
            return None
        return None if shuffles_in_a_buffer(dataset) else dataset


def storable(value: Any) -> Any:
    """The same value as numbers, texts, tensors and containers of them; raises ConfigurationError for anything else."""
    import numpy
    import torch

    if value is None or isinstance(value, (bool, int, float, str, bytes, torch.Tensor)):
        return value
    if isinstance(value, dict):
        return {storable(key): storable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return (
            type(value)(map(storable, value)) if type(value) in (list, tuple) else list(map(storable, value))
        )
    if isinstance(value, numpy.generic):
        return value.item()
    if isinstance(value, numpy.ndarray):
        return torch.from_numpy(value.copy())
    raise ConfigurationError(
        f"The position of a stream contains a {type(value).__name__!r}, which cannot be stored. Its state_dict() must "
        "return numbers, texts, lists, dicts and tensors only."
    )
