"""Completion in the shell: names of runs, jobs, checkpoints and datasets.

The shell waits for it at each Tab, so it has a time limit, and what fails suggests nothing: an error in the middle of a
line that a user types would be worse. Without a suggestion the shell completes files.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, NoReturn

import typer  # noqa: TC002 - typer evaluates the annotation of `checkpoints`

SECONDS = 2.0
"""Time limit of one completion; against a remote store most of it goes into the first connection."""
ASKED = "_CLOUDTRAIN_COMPLETE"
"""The variable with which the shell's script asks for a completion."""


def runs(incomplete: str) -> list[str]:
    """Names of runs in the store, and of jobs, whose names mean their runs."""

    def look(found: list[str]) -> None:
        from hf_cloudtrain.cli.runs import add_names

        add_names(found)

    return _starting(incomplete, look)


def jobs(incomplete: str) -> list[str]:
    """Ids of the jobs in the store."""

    def look(found: list[str]) -> None:
        from hf_cloudtrain.jobs.records import JobStore

        found += JobStore().ids()

    return _starting(incomplete, look)


def datasets(incomplete: str) -> list[str]:
    """Names of the datasets in the store."""

    def look(found: list[str]) -> None:
        from hf_cloudtrain.datasets.store import DatasetStore

        found += DatasetStore().versions()

    return _starting(incomplete, look)


def checkpoints(context: typer.Context, incomplete: str) -> list[str]:
    """Checkpoints of the run that the line names, the newest first, and folders saved by name."""
    words = (
        context.args
    )  # without the option that is completed, the line does not parse: its words are still there

    def look(found: list[str]) -> None:
        from hf_cloudtrain import env
        from hf_cloudtrain.checkpoints.named_folders import NamedFolders
        from hf_cloudtrain.cli.runs import open_run

        run = words[0] if words else os.environ[env.RUN_URL]
        catalog = open_run(run)
        keys = catalog.checkpoints()
        saves = Counter(key.step for key in keys)
        # No manifest is read, so only what tells two saves of a step apart is added: the commands accept both forms.
        found += [
            f"checkpoint-{key.step}" if saves[key.step] == 1 else f"checkpoint-{key.step}.a{key.attempt}"
            for key in reversed(keys)
        ]
        found += sorted(NamedFolders(catalog).folders())

    return _starting(incomplete, look)


def answer(app: Callable[[], Any]) -> NoReturn:
    """Run the command for a completion: nothing reaches stderr, and no thread that waits for storage delays the end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    with contextlib.suppress(
        BaseException
    ):  # SystemExit ends it; the shell must not show whatever else went wrong
        app()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(0)


def _starting(incomplete: str, look: Callable[[list[str]], None]) -> list[str]:
    """What `look` has found within the time limit, of that which starts like the word."""
    found: list[str] = []

    def work() -> None:
        with contextlib.suppress(BaseException):  # a completion never fails; it has nothing to suggest
            look(found)

    thread = threading.Thread(target=work, name="cloudtrain-complete", daemon=True)
    thread.start()
    thread.join(SECONDS)
    return [name for name in dict.fromkeys(list(found)) if name.startswith(incomplete)]
