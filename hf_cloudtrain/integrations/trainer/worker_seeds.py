"""The seed that torch draws for loader processes of evaluations that stay (`dataloader_persistent_workers=True`), once in a run.

A resumed run must not draw it a second time: see `resume.dataloaders.draw_no_seed`.
"""

from __future__ import annotations

from typing import Any

import torch


class WorkerSeeds:
    """Undoes the draw for the loaders of evaluations, which Trainer makes when it first evaluates."""

    def __init__(self) -> None:
        self._before: torch.Tensor | None = None
        self._seen: set[int] = set()

    def note(self) -> None:
        """Remember the random state of torch; an evaluation may follow."""
        self._before = torch.get_rng_state()

    def undo(self, dataloader: Any) -> None:
        """Set it again, after the first batch of an evaluation, if nothing but the seed was drawn since."""
        if self._before is None or id(dataloader) in self._seen:
            return
        self._seen.add(id(dataloader))
        copy = torch.Generator()
        copy.set_state(self._before)
        torch.empty((), dtype=torch.int64).random_(generator=copy)  # as _BaseDataLoaderIter does
        if torch.equal(copy.get_state(), torch.get_rng_state()):
            torch.set_rng_state(self._before)
