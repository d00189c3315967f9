"""Panels: whole at 80 columns, on a terminal and in a pipe; a line that is too long is not wrapped, and can be copied."""

from __future__ import annotations

import pytest
from rich.cells import cell_len

from hf_cloudtrain.cli import panels
from hf_cloudtrain.cli.panels import facts_of, show_framed, show_panels, tree_of

FILES = [("b/c.txt", 1500), ("a.txt", 5)]


def test_panels_have_one_width_and_show_everything(capsys: pytest.CaptureFixture[str]) -> None:
    show_panels(("Overview", facts_of({"name": "glue", "gone": None})), ("Files", tree_of("glue", FILES)))
    assert capsys.readouterr().out.splitlines() == [
        "╭────── Overview ───────╮",
        "│ name  glue            │",
        "╰───────────────────────╯",
        "╭──────── Files ────────╮",
        "│ glue/  1.5 kB         │",
        "│ ├── a.txt  5 B        │",
        "│ └── b/  1.5 kB        │",
        "│     └── c.txt  1.5 kB │",
        "╰───────────────────────╯",
    ]


def test_a_line_that_does_not_fit_is_whole_and_the_others_keep_their_border(
    capsys: pytest.CaptureFixture[str],
) -> None:
    url = "s3://bucket/" + "long/" * 30
    show_panels(("Overview", facts_of({"run": url, "step": 5})))
    top, name, run, step, bottom = capsys.readouterr().out.splitlines()
    assert name.startswith("│ run ")
    assert run == f"│   {url}"
    assert step.endswith(" │")
    assert len({cell_len(line) for line in (top, step, bottom)}) == 1
    assert cell_len(top) <= 80


def test_wide_letters_and_markup_keep_the_border_in_place(capsys: pytest.CaptureFixture[str]) -> None:
    show_panels(("Files", tree_of("한국어", [("[red]데이터.txt", 5), ("a", 1)])))
    lines = capsys.readouterr().out.splitlines()
    assert any("[red]데이터.txt" in line for line in lines)
    assert len({cell_len(line) for line in lines}) == 1


@pytest.mark.parametrize(("length", "is_framed"), [(65, True), (75, False)])
def test_a_table_that_is_too_wide_has_no_lines(
    capsys: pytest.CaptureFixture[str], length: int, is_framed: bool
) -> None:
    show_framed({"name": lambda record: record, ">size": len}, ["a" * length])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == (5 if is_framed else 2)
    assert max(map(cell_len, lines)) <= 81
    assert any("a" * length in line for line in lines)


def test_a_wide_terminal_is_used(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panels, "_width", lambda: 120)
    show_framed({"name": lambda record: record}, ["a" * 100])
    assert "┃" in capsys.readouterr().out
