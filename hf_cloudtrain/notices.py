"""Who may want the training to save and stop, signals aside."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from hf_cloudtrain.catalog import Catalog


@dataclass(frozen=True)
class Notice:
    """This machine is about to go, or somebody wants the training to stop."""

    source: str
    grace: float | None = None


class NoticeWatcher:
    """Looks at sources."""

    def __init__(self, sources: Iterable[object], on_notice: Callable[[Notice], None]) -> None:
        self._sources, self._on_notice = sources, on_notice

    def start(self) -> None:
        """Begin."""

    def close(self) -> None:
        """End."""


def pending(sources: Iterable[object]) -> Notice | None:
    """A notice that stands right now."""
    del sources
    return None


def default_sources(catalog: Catalog | None = None, attempt: int | None = None) -> list[object]:
    """Everybody who may give notice here."""
    del catalog, attempt
    return []
