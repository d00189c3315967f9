"""Where a run comes from: host, user, command line, library versions, git commit; without secrets."""

from __future__ import annotations

import functools
import getpass
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from hf_cloudtrain.runtime.redaction import SECRET_NAME, redact, secrets_of_environment


def origin() -> dict[str, str]:
    """Host and library versions, for manifests."""
    return {"host": platform.node(), **_versions()}


def facts() -> dict[str, str]:
    """Host, process, command line, versions and git commit, for the record of an attempt."""
    commit = _git_commit()
    return {
        **origin(),
        "pid": str(os.getpid()),
        "command": shown_command(sys.argv),
        **({"git_commit": commit} if commit else {}),
    }


def person() -> dict[str, str]:
    """User and host, for a request to a run."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError, ImportError):  # the user of a container may have no name
        user = str(os.getuid()) if hasattr(os, "getuid") else "unknown"
    return {"user": user, "host": platform.node()}


def shown_command(argv: list[str]) -> str:
    """The command line without secrets.

    Example:
        >>> shown_command(["train.py", "--hub_token", "hf_abc", "--api-key=abc"])
        'train.py --hub_token *** --api-key=***'
    """
    shown: list[str] = []
    hide = False
    for word in argv:
        name, equals, value = word.partition("=")
        secret = re.fullmatch(r"-*[\w.-]+", name) is not None and SECRET_NAME.search(name) is not None
        if (hide and not word.startswith("-")) or (word.startswith("{") and SECRET_NAME.search(word)):
            shown.append("***")
        elif equals and (secret or (value.startswith("{") and SECRET_NAME.search(value))):
            shown.append(f"{name}=***")
        else:
            shown.append(redact(word))
        hide = secret and not equals and name.startswith("-")
    return redact(" ".join(shown), secrets_of_environment())[:2000]


@functools.cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("hf_cloudtrain", "torch", "transformers", "accelerate"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _git_commit() -> str | None:
    folder = Path(sys.argv[0]).absolute().parent if sys.argv and sys.argv[0] else Path.cwd()
    try:
        answer = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
