"""`cloudtrain predict`: how far it is."""

from __future__ import annotations

import io
import sys

import pytest  # noqa: TC002 - as every test

from hf_cloudtrain.cli.commands.predict import _Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_a_bar_shows_all_rows_and_the_speed_of_new_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with _Progress(100) as progress:
        progress.add(40, True)
        progress.add(10, False)
        shown = progress._bar
        assert shown is not None
        assert (shown.n, shown.initial, shown.total) == (50, 40, 100)
    assert "50/100" in terminal.getvalue()
