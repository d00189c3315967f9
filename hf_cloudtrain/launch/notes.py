"""What the processes below a command tell it: a file with one line each, `pid<tab>what<tab>value`, appended at once.

    python            a Python has started with the hook
    off               a Python has started, but HF_CLOUDTRAIN_LAUNCH is off there
    without-package   it has imported an awaited module, but cannot import hf_cloudtrain
    imported          an awaited module was hooked
    trains            Trainer.train(), or save_state() of Accelerator, is hooked: number, output folder and command line of the training, as JSON
    restored          a state of Accelerator is on this machine: its folder, written by the launch itself
    not-stored        the last state is not on storage, and why
    refused           a script was stopped at its first step, by an error that says why
    left-alone        a training was left alone, and why

`hook/sitecustomize.py` writes the first three without this module.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

from hf_cloudtrain import env


class Note(NamedTuple):
    """One line."""

    pid: int
    what: str
    value: str


def note(what: str, value: str = "") -> None:
    """Append a line, where a command waits for it."""
    path = env.launch_notes()
    if path is None:
        return
    line = f"{os.getpid()}\t{what}\t{' '.join(value.splitlines())}\n"
    try:
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
    except OSError:  # of a launch that is over
        return
    try:
        os.write(file, line.encode("utf-8", "replace"))
    finally:
        os.close(file)


def read_notes(path: str | None) -> list[Note]:
    """All lines so far; none where no command waits for them."""
    if path is None:
        return []
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return list(_parsed(file.read()))
    except OSError:
        return []


def why_nothing(notes: list[Note]) -> str | None:
    """Why nothing was hooked, as the end of a sentence; None if something was."""
    found = {note.what for note in notes}
    if found & {"trains", "refused"}:
        return None
    reasons = dict.fromkeys(note.value for note in notes if note.what == "left-alone")
    if reasons:
        return "; ".join(reasons)
    if "without-package" in found:
        where = next(note.value for note in notes if note.what == "without-package")
        return f"{where} cannot import hf_cloudtrain: install it there"
    if "imported" in found:
        return "neither Trainer.train() nor Accelerator.save_state() was called"
    pythons = len({note.pid for note in notes if note.what == "python"})
    if pythons:
        if pythons == 1:
            return "it ran a Python process, which imported neither Trainer nor Accelerate"
        return f"it ran {pythons} Python processes, but none of them imported Trainer or Accelerate"
    if "off" in found:
        return f"{env.LAUNCH} is 'off'"
    return (
        "no Python read the hook: `python -I`, `-E` and `-S` do not, nor does one that a different machine or a cleaned "
        "environment starts"
    )


def _parsed(text: str) -> Iterator[Note]:
    for line in text.splitlines():
        pid, _, rest = line.partition("\t")
        what, _, value = rest.partition("\t")
        if pid.isdigit():
            yield Note(int(pid), what, value)
