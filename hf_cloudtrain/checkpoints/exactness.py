"""Whether a resume from a checkpoint equals an uninterrupted run, by what was seen when it was saved.

The answer is yes, no, or not verified: yes only where every source of difference is accounted for.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

from hf_cloudtrain.runtime.ranks import Ranks
from hf_cloudtrain.runtime.redaction import visible

logger = logging.getLogger(__name__)

FIND_OUT = "`cloudtrain verify-resume -- COMMAND` finds out"
"""What to do where it is not verified."""


class Exactness(NamedTuple):
    """Yes (True), no (False) or not verified (None), and why it is not yes.

    Example:
        >>> print(Exactness.no("save_only_model=True leaves out the optimizer"))
        no: save_only_model=True leaves out the optimizer
    """

    exact: bool | None = True
    reason: str | None = None

    @classmethod
    def no(cls, reason: str) -> Exactness:
        """A resume from here differs, for a known reason."""
        return cls(False, reason)

    @classmethod
    def not_verified(cls, reason: str) -> Exactness:
        """Something may hold state that no checkpoint has."""
        return cls(None, reason)

    def __and__(self, other: Exactness) -> Exactness:
        """Both findings: no outweighs not verified, and that outweighs yes; of two equal findings, the first."""
        return min(self, other, key=lambda found: _WEIGHT[found.exact])

    def __str__(self) -> str:
        return self.answer if self.exact else f"{self.answer}: {self._why}"

    @property
    def answer(self) -> str:
        """Without the reason."""
        return {True: "yes", False: "no", None: "not verified"}[self.exact]

    @property
    def word(self) -> str:
        """For a column of notes."""
        return {True: "exact", False: "not exact", None: "exactness not verified"}[self.exact]

    @property
    def sentence(self) -> str:
        """What a resume from here means, for the log."""
        if self.exact:
            return "A resume equals an uninterrupted run."
        if self.exact is None:
            return f"Whether a resume equals an uninterrupted run is not verified: {self._why}. {FIND_OUT}."
        return f"A resume will not equal an uninterrupted run: {self._why}."

    @property
    def level(self) -> int:
        """Of the sentence in the log: what is not verified may be as it should be."""
        return logging.WARNING if self.exact is False else logging.INFO

    @property
    def _why(self) -> str:
        return visible(self.reason or "no reason is recorded")


EXACT = Exactness()
NOT_SAID = Exactness.not_verified("the code that saved it did not say")
_WEIGHT = {False: 0, None: 1, True: 2}


def safely(look: Callable[[], Exactness]) -> Exactness:
    """What a look at a training finds. It reads objects of the script, and none of their errors may end the training."""
    try:
        return look()
    except Exception as error:
        logger.debug("Whether a resume is exact could not be seen.", exc_info=True)
        return Exactness.not_verified(f"a look at it ended with {type(error).__name__}: {str(error)[:200]}")


def strongest(found: Exactness, ranks: Ranks) -> Exactness:
    """The strongest finding of all ranks, on all ranks; also a barrier."""
    if ranks.size == 1:
        return found
    mine = -float(_WEIGHT[found.exact])
    worst, main = ranks.begin_largest([mine, mine if ranks.is_main else -3.0]).result()
    if worst == main:
        return found  # of rank 0, which writes the manifest
    return functools.reduce(Exactness.__and__, ranks.each(lambda: found, "say whether a resume is exact"))
