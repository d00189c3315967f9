"""The variables that put the hook into each Python that a command starts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from hf_cloudtrain import env

FOLDER = str(Path(__file__).resolve().parent / "hook")
"""The folder whose `sitecustomize.py` Python imports at its start, because it is in front of `PYTHONPATH`."""


def is_off(environment: Mapping[str, str]) -> bool:
    """Whether the user has opted out."""
    return environment.get(env.LAUNCH, "").strip().lower() == "off"


def hooked(environment: Mapping[str, str], *, run_url: str, notes: str | None = None) -> dict[str, str]:
    """An environment with the hook.

    Args:
        environment: of the command without it.
        run_url: URL of the run.
        notes: file to which processes write what was hooked.

    Example:
        >>> hooked({"PYTHONPATH": "src"}, run_url="s3://bucket/runs/sft")["PYTHONPATH"]
        '…/hf_cloudtrain/launch/hook:src'
    """
    path = with_hook(environment.get("PYTHONPATH"))
    found = {**environment, "PYTHONPATH": path, env.RUN_URL: run_url}
    if notes is not None:
        found[env.LAUNCH_NOTES] = notes
    return found


def with_hook(path: str | None) -> str:
    """A `PYTHONPATH` with the hook in front, once."""
    # An empty entry is the current folder, as Python reads it, so it stays.
    others = [] if not path else [one for one in path.split(os.pathsep) if one != FOLDER]
    return os.pathsep.join([FOLDER, *others])
