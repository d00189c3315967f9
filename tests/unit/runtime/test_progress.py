"""Progress of a transfer, and a bar only if it takes a while."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from hf_cloudtrain.runtime import progress
from hf_cloudtrain.runtime.progress import Bar, Progress

if TYPE_CHECKING:
    import pytest


def test_bytes_add_up_and_a_failed_try_is_subtracted() -> None:
    moved = Progress()
    moved.begin("Uploading checkpoint-5", 100)
    moved.add(60)
    moved.add(-60)
    moved.add(100)
    assert (moved.title, moved.total, moved.done) == ("Uploading checkpoint-5", 100, 100)
    moved.begin("Uploading checkpoint-10", 5)
    assert (moved.total, moved.done) == (5, 0)


def test_bytes_of_many_threads_are_all_counted() -> None:
    moved = Progress()
    threads = [
        threading.Thread(target=lambda: [moved.add(1) for _ in range(2_000)] and None) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert moved.done == 8_000


def test_a_quick_transfer_shows_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    moved = Progress()
    with Bar(moved):
        moved.begin("Downloading", 10)
        moved.add(10)
    assert capsys.readouterr() == ("", "")


def test_a_long_transfer_shows_a_bar_with_its_title(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "QUIET_SECONDS", -1.0)
    moved = Progress()
    with Bar(moved):
        moved.begin("Downloading checkpoint-5", 2048)
        moved.add(2048)
    out, err = capsys.readouterr()
    assert out == ""
    assert "Downloading checkpoint-5" in err
    assert "2.05k/2.05k" in err


def test_a_hidden_bar_shows_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "QUIET_SECONDS", -1.0)
    moved = Progress()
    with Bar(moved, hidden=True) as bar:
        moved.begin("Downloading", 10)
        moved.add(10)
        bar.update()
    assert capsys.readouterr() == ("", "")


def test_the_next_transfer_starts_at_zero_in_the_same_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "QUIET_SECONDS", -1.0)
    moved = Progress()
    with Bar(moved):
        moved.begin("Uploading checkpoint-5", 1024)
        moved.add(1024)
        moved.begin("Uploading checkpoint-10", 4096)
        moved.add(1024)
    last = capsys.readouterr().err.split("\r")[-1]
    assert "Uploading checkpoint-10" in last
    assert "1.02k/4.10k" in last


def test_bytes_that_arrive_while_the_bar_is_removed_are_counted() -> None:
    """The upload continues after the user has stopped watching it."""

    class Left(Progress):
        """Its bar exists when a thread reads it, and is removed before the thread calls it."""

        looks = 0

        @property
        def bar(self) -> Bar | None:
            self.looks += 1
            return Bar(Progress(), hidden=True) if self.looks == 1 else None

        @bar.setter
        def bar(self, value: Bar | None) -> None:
            pass

    moved = Left()
    moved.add(1)
    assert moved.done == 1
