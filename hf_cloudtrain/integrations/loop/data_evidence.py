"""What the training data of a loop does besides handing out samples: random numbers in loader processes, state of its own.

What is drawn in this process is not looked for: a resume repeats it (`resume.data_position`).
"""

from __future__ import annotations

from typing import Any

from hf_cloudtrain.checkpoints.exactness import EXACT, Exactness
from hf_cloudtrain.resume.fetch_witness import FetchWitness
from hf_cloudtrain.resume.state_look import Looker, changed

_DRAWN = Exactness.no(
    "the loader processes draw random numbers for the batches, and a resume starts them again from new seeds"
)
_UNSEEN = Exactness.not_verified("it was not seen whether the loader processes draw random numbers")


class DataEvidence:
    """What was seen of the DataLoaders of one loop.

    Example:
        >>> evidence.begin(dataloader)                      # before an epoch iterates it
        >>> print(evidence.look(between_epochs=False))      # at a save
        yes
    """

    def __init__(self) -> None:
        self._loaders: dict[int, _Loader] = {}
        self._current: _Loader | None = None

    def begin(self, dataloader: Any) -> None:
        """An epoch begins to iterate a DataLoader."""
        base = getattr(dataloader, "base_dataloader", dataloader)
        if id(base) not in self._loaders:
            self._loaders[id(base)] = _Loader(base)
        self._current = self._loaders[id(base)]

    def look(self, *, between_epochs: bool) -> Exactness:
        """What is known now of the DataLoader of this epoch."""
        if self._current is None:
            return EXACT
        return self._current.draws(between_epochs=between_epochs) & self._current.keeps_state()


class _Loader:
    """One DataLoader of torch. It stays watched: its loader processes may live as long as it does."""

    def __init__(self, base: Any) -> None:
        self._base = base
        self._witness = FetchWitness(base) if base.num_workers else None
        self._looker = Looker()
        self._before = {name: self._looker.look(part) for name, part in self._parts()}
        self._found = EXACT

    def draws(self, *, between_epochs: bool) -> Exactness:
        """Whether the loader processes draw random numbers that a resume does not repeat."""
        if self._witness is None or (between_epochs and not self._base.persistent_workers):
            return EXACT  # the next epoch starts processes whose seeds are drawn from the states of the save
        drawn = self._witness.after(None)
        if drawn.share:
            return _DRAWN
        return EXACT if self._witness.can_watch and drawn.watched else _UNSEEN

    def keeps_state(self) -> Exactness:
        """Whether the data has changed since the first epoch began."""
        for name, part in self._parts():
            attribute = changed(self._before[name], self._looker.look(part))
            if attribute is not None and self._found.exact:
                self._found = Exactness.not_verified(
                    f"{type(part).__name__} ({name}) keeps state ({attribute!r}) that changes in training, and no checkpoint "
                    "has it"
                )
        return self._found

    def _parts(self) -> list[tuple[str, Any]]:
        """The objects of the script that a fetch uses. What has a state_dict is saved with the position."""
        dataset, collate = self._base.dataset, self._base.collate_fn
        parts = [("dataset", dataset), ("collate_fn", getattr(collate, "inner", collate))]
        return [
            (name, part)
            for name, part in parts
            if not hasattr(part, "state_dict") and type(part).__module__.partition(".")[0] != "datasets"
        ]
