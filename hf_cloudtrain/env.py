"""Every environment variable this package reads: its default, its unit, its meaning. An argument beats it."""

from __future__ import annotations

import json
import os
import re
import zlib
from typing import Any

from hf_cloudtrain.errors import ConfigurationError

RUN_URL = "HF_CLOUDTRAIN_RUN_URL"
"""Run URL used when the code names none. No default."""

STORAGE_OPTIONS = "HF_CLOUDTRAIN_STORAGE_OPTIONS"
"""JSON object of fsspec `storage_options`, used when the code passes none. Default `{}`."""

STORE = "HF_CLOUDTRAIN_STORE"
"""Store of a user, any URL: datasets, and what jobs keep. Default `~/.hf_cloudtrain`."""

CACHE = "HF_CLOUDTRAIN_CACHE"
"""Folder for local copies of datasets, shared by the processes of a machine. Default `~/.cache/hf_cloudtrain`."""

CHECKPOINT_DIR = "HF_CLOUDTRAIN_CHECKPOINT_DIR"
"""Folder that the function API uploads and restores, used when `init` names none, and `TrainLoop`'s. No default."""

RESTORED_CHECKPOINT = "HF_CLOUDTRAIN_RESTORED_CHECKPOINT"
"""Set by a launcher that restored a checkpoint before the script began: its key, such as 000003-0000000500. No default."""

DRAIN_TIMEOUT = "HF_CLOUDTRAIN_DRAIN_TIMEOUT"
"""Seconds that the end of training waits for uploads. Default 1800: 225 GB at 1 Gbit/s."""

HEARTBEAT = "HF_CLOUDTRAIN_HEARTBEAT"
"""Seconds between two heartbeats in `progress/`, and between two looks for a newer attempt. Default 15."""

GRACE = "HF_CLOUDTRAIN_GRACE"
"""Seconds that a machine has after a notice that names none, such as a signal. Default 30, as launchers have it."""

EXIT_FILE = "HF_CLOUDTRAIN_EXIT_FILE"
"""File that says how an attempt ended, for whoever started the process. No default."""

STOP_FILE = "HF_CLOUDTRAIN_STOP_FILE"
"""A path: when a file appears there, the run saves and stops. No default."""

CLOUD_NOTICES = "HF_CLOUDTRAIN_CLOUD_NOTICES"
"""Which cloud's metadata service is asked for notices: `ec2`, `gce`, `azure`, `off`. Default `auto`: what the machine is."""

EC2_DISABLED = "AWS_EC2_METADATA_DISABLED"
"""AWS's own: `true` forbids any question to EC2's metadata service. Default `false`."""

EC2_ENDPOINT = "AWS_EC2_METADATA_SERVICE_ENDPOINT"
"""AWS's own: URL of EC2's metadata service. Default `http://169.254.169.254`."""

GCE_HOST = "GCE_METADATA_HOST"
"""Google's own: host, or host:port, of its metadata service. Default `169.254.169.254`."""

VERIFY_FOLDER = "HF_CLOUDTRAIN_VERIFY_FOLDER"
"""Set by `cloudtrain verify-resume`: scratch folder that holds the run, whatever URL is named, and the output. No default."""


DEFAULT_GRACE = 30.0
"""Seconds; see `GRACE`."""


def run_url(argument: str | None) -> str:
    """The run URL from the argument, else from `HF_CLOUDTRAIN_RUN_URL`."""
    url = argument or os.environ.get(RUN_URL)
    if not url:
        raise ConfigurationError(
            f"No run URL was given. Pass one, for example CloudTrainCallback('s3://bucket/runs/mrpc'), or set {RUN_URL}."
        )
    return _in_scratch(url)


def storage_options(argument: dict[str, Any] | None) -> dict[str, Any]:
    """The storage options from the argument, else from `HF_CLOUDTRAIN_STORAGE_OPTIONS`."""
    if argument is not None:
        return dict(argument)
    text = os.environ.get(STORAGE_OPTIONS)
    if not text:
        return {}
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        # The value may hold a secret key, so it is not quoted.
        raise ConfigurationError(
            f'{STORAGE_OPTIONS} is not a JSON object, such as {{"profile": "training"}}.'
        )
    return value


def run_url_or_none(argument: str | None) -> str | None:
    """The run URL from the argument, else from `HF_CLOUDTRAIN_RUN_URL`, else None."""
    url = argument or os.environ.get(RUN_URL)
    return _in_scratch(url) if url else None


def store(argument: str | None) -> str:
    """URL or absolute folder of the store from the argument, else from `HF_CLOUDTRAIN_STORE`, else in the home folder."""
    found = argument or os.environ.get(STORE) or own_folder()
    # A job's processes run in other folders than whoever submits it.
    return found if "://" in found else os.path.abspath(os.path.expanduser(found))


def own_folder() -> str:
    """The folder of this package in the user's home folder."""
    return _at_home("~/.hf_cloudtrain", STORE)


def cache(argument: str | os.PathLike[str] | None) -> str:
    """The cache folder from the argument, else from `HF_CLOUDTRAIN_CACHE`, else in the home folder."""
    given = os.fspath(argument) if argument else os.environ.get(CACHE)
    return os.path.abspath(given or _at_home("~/.cache/hf_cloudtrain", CACHE))


def verify_folder() -> str | None:
    """The scratch folder of `cloudtrain verify-resume`, absolute; None outside of it."""
    return os.environ.get(VERIFY_FOLDER) or None


def checkpoint_dir(argument: str | os.PathLike[str] | None) -> str | None:
    """The checkpoint folder from the argument, else from `HF_CLOUDTRAIN_CHECKPOINT_DIR`, else None."""
    return os.fspath(argument) if argument else os.environ.get(CHECKPOINT_DIR) or None


def restored_checkpoint() -> str | None:
    """The key of the checkpoint that a launcher says it restored.

    None after torchrun restarted its workers: what the launcher put there has been written over since.
    """
    return None if is_restart() else os.environ.get(RESTORED_CHECKPOINT) or None


def is_restart() -> bool:
    """Whether torchrun has started these workers again, rather than a person."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def drain_timeout() -> float:
    """Seconds that the end of training waits for uploads."""
    return _seconds(DRAIN_TIMEOUT, 1800.0)


def heartbeat() -> float:
    """Seconds between two heartbeats."""
    return _seconds(HEARTBEAT, 15.0)


def grace(argument: float | None) -> float:
    """Seconds that a machine has after a notice that names none."""
    if argument is None:
        return _seconds(GRACE, DEFAULT_GRACE)
    if not 0 < argument < 1e9:
        raise ConfigurationError(f"grace_seconds={argument!r} is not a number of seconds above 0.")
    return float(argument)


def shutdown_timeout() -> float | None:
    """Seconds that torchrun gives its workers after a signal (`--shutdown-timeout`, 30 unless set); None without it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    return _seconds("PET_SHUTDOWN_TIMEOUT", 30.0)


def exit_file() -> str | None:
    """The file that says how an attempt ended."""
    return os.environ.get(EXIT_FILE) or None


def stop_file() -> str | None:
    """The file whose appearance stops the run, else None."""
    return os.environ.get(STOP_FILE) or None


def cloud_notices() -> str:
    """Which cloud to ask for notices: `auto`, `off`, `ec2`, `gce` or `azure`."""
    value = os.environ.get(CLOUD_NOTICES, "").strip().lower() or "auto"
    if value not in ("auto", "off", "ec2", "gce", "azure"):
        raise ConfigurationError(f"{CLOUD_NOTICES}={value!r} is none of auto, off, ec2, gce and azure.")
    return value


def ec2_endpoint() -> str | None:
    """URL of EC2's metadata service; None where AWS's own variable forbids to ask it."""
    if os.environ.get(EC2_DISABLED, "").strip().lower() == "true":
        return None
    return os.environ.get(EC2_ENDPOINT) or "http://169.254.169.254"


def gce_endpoint() -> str:
    """URL of Google's metadata service. By its address: looking up its name has no time limit."""
    return f"http://{os.environ.get(GCE_HOST) or '169.254.169.254'}"


def _in_scratch(url: str) -> str:
    """Under `verify-resume` a folder that stands for the URL: a script that names its own run must not touch it."""
    folder = verify_folder()
    if folder is None or url.startswith(f"{folder}/runs/"):
        return url
    name = re.sub(r"[^A-Za-z0-9]+", "-", url)[-40:].strip("-")
    return f"{folder}/runs/{name}-{zlib.crc32(url.encode('utf-8', 'replace')):08x}"


def _at_home(folder: str, name: str) -> str:
    found = os.path.expanduser(folder)
    if found.startswith("~"):
        raise ConfigurationError(f"This user has no home folder. Set {name}.")
    return found


def _seconds(name: str, default: float) -> float:
    text = os.environ.get(name)
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1e9:
        raise ConfigurationError(f"{name}={text!r} is not a number of seconds above 0.")
    return value
