"""`cloudtrain predict`: how far it is."""

from __future__ import annotations

import io
import os
import subprocess
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


def test_with_a_bar_that_is_disabled_lines_show_the_progress() -> None:
    """tqdm reads TQDM_DISABLE when it is imported."""
    code = (
        "import sys\nfrom hf_cloudtrain.cli.commands import predict\n"
        "sys.stderr.isatty = lambda: True\npredict.SAY_EVERY = -1.0\n"
        "with predict._Progress(100) as progress:\n    progress.add(40, True)\n    progress.add(10, False)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TQDM_DISABLE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stderr.splitlines()) == (
        0,
        ["Predicted 40 of 100 rows.", "Predicted 50 of 100 rows."],
    )
