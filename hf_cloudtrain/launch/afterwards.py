"""What `cloudtrain launch` says after a command that failed or was killed: what is safe, and what the same command does."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Sequence

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.outbox import Outbox
from hf_cloudtrain.errors import CloudTrainError
from hf_cloudtrain.launch.before import home_here
from hf_cloudtrain.launch.notes import Note
from hf_cloudtrain.launch.numbering import Numbers
from hf_cloudtrain.launch.state_folders import FOLDER
from hf_cloudtrain.runtime.threads import answer_in_time
from hf_cloudtrain.storage.client import Storage

PATIENCE = 10.0
"""Seconds for an answer of the storage: a shell waits for the exit code."""


def what_is_safe(run_url: str, notes: Sequence[Note], code: int) -> str:
    """How the command ended, the newest checkpoint of its last training, and what waits on this disk for its upload.

    Args:
        notes: what the processes of the command have told.
        code: the exit code of the command, 128 and the number for a signal.
    """
    trained = [json.loads(one.value)["number"] for one in notes if one.what == "trains"]
    url = Numbers(run_url).url_of(trained[-1] if trained else 1)
    deadline = time.monotonic() + PATIENCE
    try:
        safe = answer_in_time(lambda: _safe(url), lambda: time.monotonic() > deadline)
    except (CloudTrainError, OSError) as error:  # the exit code of the command matters more
        safe = f"The storage does not tell what is safe: {error}"
    return f"{_ended(code)} {safe}"


def _safe(run_url: str) -> str:
    catalog = Catalog(Storage(run_url, env.storage_options(None)))
    keys, url = catalog.checkpoints(), catalog.storage.url
    if keys:
        folder = catalog.read(keys[-1]).origin.get(FOLDER)
        then = "resumes from it" if folder is None else f"finds it restored, as {folder!r}"
        text = f"{keys[-1].title} is safe in {url!r}, and the same command {then}."
    else:
        text = f"{url!r} has no checkpoint yet, so the same command starts at step 0."
    home = home_here(catalog)
    waiting = [] if home is None else [one for one in Outbox(home).entries(url) if one.key not in keys]
    if waiting:
        names = ", ".join(one.title for one in waiting)
        text += f" Only on this disk: {names}. A start here uploads it first; so does `cloudtrain checkpoint flush {home}`."
    return text


def _ended(code: int) -> str:
    try:
        return f"The command was ended by {signal.Signals(code - 128).name}."
    except ValueError:
        return f"The command ended with exit code {code}."
