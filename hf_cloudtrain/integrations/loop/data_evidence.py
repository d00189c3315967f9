"""What the training data of a loop does besides handing out samples: random numbers in loader processes, state of its own.

What is drawn in this process is not looked for: a resume repeats it (`resume.data_position`). So it does with a stream that it
reads again from its beginning, in loader processes too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hf_cloudtrain.checkpoints.exactness import EXACT, Exactness
from hf_cloudtrain.resume.dataloaders import BY_READING, BY_STATE, is_seeded
from hf_cloudtrain.resume.fetch_witness import IN_WORKERS, FetchWitness
from hf_cloudtrain.resume.loader_state import LoaderState
from hf_cloudtrain.resume.script_code import may_seed
from hf_cloudtrain.resume.state_look import Looker, StateLook, name_of, script_parts

_DRAWN = (
    "the loader processes draw random numbers for the batches, and a resume starts them again from new seeds"
)
_UNSEEN = Exactness.not_verified("it was not seen whether the loader processes draw random numbers")
_UNSEEDED = Exactness.not_verified(
    "the stream is shuffled or mixed without a seed, so each start has another order"
)


MOST_LOADERS = 8
"""DataLoaders that are remembered, with what was seen of them."""


class DataEvidence:
    """What was seen of the DataLoaders of one loop.

    Example:
        >>> evidence.begin(dataloader)                      # before an epoch iterates it
        >>> print(evidence.look(between_epochs=False))      # at a save
        yes
    """

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self._loaders: dict[int, _Loader] = {}
        self._current: _Loader | None = None

    def begin(self, dataloader: Any) -> None:
        """An epoch begins to iterate a DataLoader."""
        base = getattr(dataloader, "base_dataloader", dataloader)
        if id(base) not in self._loaders:
            self._loaders[id(base)] = _Loader(dataloader, base, self._looker())
        self._current = self._loaders[id(base)]
        # A script that makes one for each epoch would keep all of them in memory.
        if len(self._loaders) > MOST_LOADERS:
            del self._loaders[next(iter(self._loaders))]

    def look(self, *, between_epochs: bool) -> Exactness:
        """What is known now of the DataLoader of this epoch."""
        if self._current is None:
            return EXACT
        return self._current.draws(between_epochs=between_epochs) & self._current.state.look()

    def _looker(self) -> Looker:
        """Knows what Accelerate saves."""
        accelerator = self._accelerator
        models = [accelerator.unwrap_model(model) for model in accelerator._models]
        inner = [getattr(one, "optimizer", None) for one in accelerator._optimizers]
        parameters = [parameter for model in models for parameter in model.parameters()]
        saved = (
            *accelerator._models,
            *accelerator._optimizers,
            *accelerator._schedulers,
            *accelerator._custom_objects,
        )
        return Looker([accelerator, *models, *parameters, *inner, *saved])


class _Loader:
    """One DataLoader of torch. It stays watched: its loader processes may live as long as it does."""

    def __init__(self, dataloader: Any, base: Any, looker: Looker) -> None:
        self._base = base
        self._way = LoaderState(dataloader).way
        self._witness = FetchWitness(base) if base.num_workers else None
        self._is_seeded = is_seeded(base.dataset)
        self.state = StateLook(looker, self._parts())
        """Of the objects of the script that a fetch uses."""

    def draws(self, *, between_epochs: bool) -> Exactness:
        """Whether the loader processes do what a resume does not repeat."""
        found = EXACT if self._is_seeded else _UNSEEDED
        is_repeated = self._way == BY_READING or between_epochs  # from the random states of the checkpoint
        if self._witness is None or (is_repeated and not self._base.persistent_workers):
            return found
        drawn = self._witness.after(None)
        if drawn.share:
            seeds = next((name_of(part) for _, part in self._parts() if may_seed(part)), None)
            if seeds is None:
                return Exactness.no(_DRAWN)
            return Exactness.not_verified(f"{seeds} seeds random numbers as batches are fetched")
        if name := self._witness.changes_in_workers:
            return found & Exactness.not_verified(IN_WORKERS.format(name=name))
        return found & (EXACT if self._witness.can_watch and drawn.watched else _UNSEEN)

    def _parts(self) -> Iterator[tuple[str, Any]]:
        """The state of a stream or a stateful DataLoader is saved with the position."""
        dataset, collate = self._base.dataset, self._base.collate_fn
        if not (self._way == BY_STATE and hasattr(dataset, "state_dict")):
            yield from (("dataset", part) for part in script_parts(dataset))
        yield from (("collate_fn", part) for part in script_parts(getattr(collate, "inner", collate)))
