"""Every environment variable that this package reads. An argument of the API takes precedence over its variable.

The docstrings of the constants are the table of docs/environment.md: meaning, unit, "Default: …" last.
"""

from __future__ import annotations

import json
import logging
import os
import re
import zlib
from typing import Any

from hf_cloudtrain.errors import ConfigurationError

RUN_URL = "HF_CLOUDTRAIN_RUN_URL"
"""Run URL for code that passes none: any fsspec URL, or a folder. Default: none."""
STORAGE_OPTIONS = "HF_CLOUDTRAIN_STORAGE_OPTIONS"
"""JSON object with the `storage_options` of fsspec, for code that passes none. Default: `{}`."""
STORE = "HF_CLOUDTRAIN_STORE"
"""URL or folder that holds your datasets and the records of your jobs. Default: `~/.hf_cloudtrain`."""
CACHE = "HF_CLOUDTRAIN_CACHE"
"""Folder for local copies of datasets and of served models, shared by the processes of a machine. Default: `~/.cache/hf_cloudtrain`."""
CHECKPOINT_DIR = "HF_CLOUDTRAIN_CHECKPOINT_DIR"
"""Folder that the function API uploads and restores, and output folder of `TrainLoop`, if the code names none.
Default: none."""
PERIFLOW_CHECKPOINT_DIR = "CKPT_DIR"
"""PeriFlow's name of the same folder, for `init` where neither the code nor the variable above names one; jobs set it
too. Default: none."""
RESTORED_CHECKPOINT = "HF_CLOUDTRAIN_RESTORED_CHECKPOINT"
"""Set by a launcher that has restored a checkpoint before the script starts: its key, such as `000003-0000000500`.
Default: none."""
DRAIN_TIMEOUT = "HF_CLOUDTRAIN_DRAIN_TIMEOUT"
"""Seconds that the end of training waits for uploads. Default: `1800`, enough for 225 GB at 1 Gbit/s."""
HEARTBEAT = "HF_CLOUDTRAIN_HEARTBEAT"
"""Seconds between two heartbeats of a run, and between two checks for a newer attempt. Default: `15`."""
GRACE = "HF_CLOUDTRAIN_GRACE"
"""Seconds from a preemption notice that names no time, such as a signal, to the end of the machine. Default: `30`, as
for torchrun."""
EXIT_FILE = "HF_CLOUDTRAIN_EXIT_FILE"
"""File to which an attempt writes how it ended, for the program that started it. Default: none."""
STOP_FILE = "HF_CLOUDTRAIN_STOP_FILE"
"""Path of a file: once it exists, the run saves and stops. Default: none."""
CLOUD_NOTICES = "HF_CLOUDTRAIN_CLOUD_NOTICES"
"""Metadata service that is asked for preemption notices: `ec2`, `gce`, `azure`, `off`, or `auto`, which recognises the
machine. Default: `auto`."""
EC2_DISABLED = "AWS_EC2_METADATA_DISABLED"
"""Variable of AWS: `true` forbids requests to the metadata service of EC2. Default: `false`."""
EC2_ENDPOINT = "AWS_EC2_METADATA_SERVICE_ENDPOINT"
"""Variable of AWS: URL of the metadata service of EC2. Default: `http://169.254.169.254`."""
GCE_HOST = "GCE_METADATA_HOST"
"""Variable of Google Cloud: host, or host:port, of its metadata service. Default: `169.254.169.254`."""
ASYNC_SAVE = "HF_CLOUDTRAIN_ASYNC_SAVE"
"""Whether files of a save are written in the background: `1` or `0`, for code that does not say. Default: where a checkpoint
has 64 MB or more."""
EXPERIMENT = "HF_CLOUDTRAIN_EXPERIMENT"
"""Name of the group of runs that a run belongs to, recorded with each attempt; jobs set it to their `experiment`.
Default: none."""
PRICE = "HF_CLOUDTRAIN_PRICE"
"""Price of an hour of all machines of a training, a number in any currency; the pages show what its run has cost.
Default: the price of the job's machines, if `vms.yml` or SkyPilot's catalog lists it."""
PAGE = "HF_CLOUDTRAIN_PAGE"
"""Whether a page that lives with the run is written beside it, as `index.html`: `1` or `0`, for code that does not say.
Default: `0`."""
LOG = "HF_CLOUDTRAIN_LOG"
"""Lowest level of the messages of a training: `debug`, `info`, `warning`, `error` or `critical`. Default: transformers'
verbosity, but `info` where that is `warning`, its own default."""
LAUNCH = "HF_CLOUDTRAIN_LAUNCH"
"""`off`: processes below `cloudtrain launch`, or a job with `launch: auto`, train as without it. Default: none."""
LAUNCH_NOTES = "HF_CLOUDTRAIN_LAUNCH_NOTES"
"""Set by `cloudtrain launch`: file to which the processes below it write what was hooked. Default: none."""
UI_TOKEN = "HF_CLOUDTRAIN_UI_TOKEN"  # noqa: S105 - the name of a variable
"""Token of the page that `cloudtrain ui` serves, at least 16 characters; if it is set, reading needs it on this machine too.
Default: a new one at each start, where one is needed."""
VERIFY_FOLDER = "HF_CLOUDTRAIN_VERIFY_FOLDER"
"""Set by `cloudtrain verify-resume`: scratch folder for the run and its output, whatever URL the script names.
Default: none."""

DEFAULT_GRACE = 30.0
"""Seconds; see `GRACE`."""


def run_url(argument: str | os.PathLike[str] | None) -> str:
    """The run URL from the argument, else from `HF_CLOUDTRAIN_RUN_URL`."""
    url = run_url_or_none(argument)
    if url is None:
        raise ConfigurationError(
            f"No run URL was given. Pass one, such as CloudTrainCallback('s3://bucket/runs/mrpc'), or set {RUN_URL}."
        )
    return url


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


def run_url_or_none(argument: str | os.PathLike[str] | None) -> str | None:
    """The run URL from the argument, else from `HF_CLOUDTRAIN_RUN_URL`, else None; as it was given."""
    url = os.fspath(argument) if argument else os.environ.get(RUN_URL)
    return _in_scratch(url) if url else None


def store(argument: str | None) -> str:
    """URL or folder of the store from the argument, else from `HF_CLOUDTRAIN_STORE`, else in the home folder; as given."""
    return argument or os.environ.get(STORE) or own_folder()


def own_folder() -> str:
    """The folder of this package in the home folder of the user."""
    return _at_home("~/.hf_cloudtrain", STORE)


def cache(argument: str | os.PathLike[str] | None) -> str:
    """The cache folder from the argument, else from `HF_CLOUDTRAIN_CACHE`, else in the home folder."""
    given = os.fspath(argument) if argument else os.environ.get(CACHE)
    return os.path.abspath(given or _at_home("~/.cache/hf_cloudtrain", CACHE))


def verify_folder() -> str | None:
    """The absolute scratch folder of `cloudtrain verify-resume`; None outside of it."""
    return os.environ.get(VERIFY_FOLDER) or None


def checkpoint_dir(argument: str | os.PathLike[str] | None) -> str | None:
    """The checkpoint folder from the argument, else from `HF_CLOUDTRAIN_CHECKPOINT_DIR`, else None."""
    return os.fspath(argument) if argument else os.environ.get(CHECKPOINT_DIR) or None


def periflow_checkpoint_dir() -> str | None:
    """The checkpoint folder from `CKPT_DIR`, which PeriFlow set for its scripts; None without one."""
    return os.environ.get(PERIFLOW_CHECKPOINT_DIR) or None


def restored_checkpoint() -> str | None:
    """The key of the checkpoint that a launcher restored.

    None after torchrun has restarted its workers: the training has overwritten the restored files since.
    """
    return None if is_restart() else os.environ.get(RESTORED_CHECKPOINT) or None


def is_restart() -> bool:
    """Whether torchrun has restarted these workers."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def log_level() -> int | None:
    """The lowest level of the messages of a training, as a number of `logging`; None if it is not set."""
    name = os.environ.get(LOG, "").strip().upper()
    if not name:
        return None
    if name not in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"):
        raise ConfigurationError(
            f"{LOG}={name.lower()!r} must be one of: debug, info, warning, error, critical."
        )
    return int(getattr(logging, name))


def async_save(argument: bool | None) -> bool | None:
    """Whether saves are asynchronous, from the argument, else from `HF_CLOUDTRAIN_ASYNC_SAVE`; None: where it is worth it."""
    return _switch(ASYNC_SAVE, argument)


def experiment() -> str | None:
    """The group of runs that a run belongs to, if any."""
    return os.environ.get(EXPERIMENT) or None


def price() -> float | None:
    """Price of an hour of all machines of the training, if it is known."""
    return _seconds(PRICE, 0.0, "number") or None


def page(argument: bool | None) -> bool:
    """Whether a page lives with the run, from the argument, else from `HF_CLOUDTRAIN_PAGE`."""
    return bool(_switch(PAGE, argument))


def drain_timeout() -> float:
    """Seconds that the end of training waits for uploads."""
    return _seconds(DRAIN_TIMEOUT, 1800.0)


def heartbeat() -> float:
    """Seconds between two heartbeats."""
    return _seconds(HEARTBEAT, 15.0)


def grace(argument: float | None) -> float:
    """Seconds from a preemption notice that names no time to the end of the machine."""
    if argument is None:
        return _seconds(GRACE, DEFAULT_GRACE)
    if not 0 < argument < 1e9:
        raise ConfigurationError(f"grace_seconds={argument!r} must be a positive number of seconds.")
    return float(argument)


def shutdown_timeout() -> float | None:
    """Seconds that torchrun gives its workers after a signal (`--shutdown-timeout`, 30 unless set); None without it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    return _seconds("PET_SHUTDOWN_TIMEOUT", 30.0)


def launch_notes() -> str | None:
    """The file to which processes below `cloudtrain launch` write what was hooked; None outside of it."""
    return os.environ.get(LAUNCH_NOTES) or None


def exit_file() -> str | None:
    """The file to which an attempt writes how it ended, else None."""
    return os.environ.get(EXIT_FILE) or None


def stop_file() -> str | None:
    """The file that stops the run once it exists, else None."""
    return os.environ.get(STOP_FILE) or None


def ui_token() -> str | None:
    """The token of the web page, if the user has set one."""
    return os.environ.get(UI_TOKEN) or None


def cloud_notices() -> str:
    """The cloud whose metadata service is asked for notices: `auto`, `off`, `ec2`, `gce` or `azure`."""
    value = os.environ.get(CLOUD_NOTICES, "").strip().lower() or "auto"
    if value not in ("auto", "off", "ec2", "gce", "azure"):
        raise ConfigurationError(f"{CLOUD_NOTICES}={value!r} must be one of: auto, off, ec2, gce, azure.")
    return value


def ec2_endpoint() -> str | None:
    """URL of the metadata service of EC2; None if the variable of AWS forbids requests to it."""
    if os.environ.get(EC2_DISABLED, "").strip().lower() == "true":
        return None
    return os.environ.get(EC2_ENDPOINT) or "http://169.254.169.254"


def gce_endpoint() -> str:
    """URL of the metadata service of Google Cloud. It has an IP address: the lookup of a name has no time limit."""
    return f"http://{os.environ.get(GCE_HOST) or '169.254.169.254'}"


def _in_scratch(url: str) -> str:
    """Under `verify-resume`, a folder in place of the URL: the test must not touch the real run of the script."""
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


def _switch(name: str, argument: bool | None) -> bool | None:
    text = os.environ.get(name)
    if argument is not None or not text:
        return argument
    if text not in ("0", "1"):
        raise ConfigurationError(f"{name} is {text!r}. Set it to 1 or 0.")
    return text == "1"


def _seconds(name: str, default: float, what: str = "number of seconds") -> float:
    text = os.environ.get(name)
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1e9:
        raise ConfigurationError(f"{name}={text!r} must be a positive {what}.")
    return value
