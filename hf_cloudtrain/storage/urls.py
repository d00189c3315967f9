"""Storage URLs: the protocol and the folder that a URL names, and the URL as it may be shown."""

from __future__ import annotations

import os

from hf_cloudtrain.errors import ConfigurationError, MissingExtraError
from hf_cloudtrain.runtime.redaction import has_user_part, redact

EXTRAS = {
    "s3": "s3",
    "s3a": "s3",
    "gs": "gcs",
    "gcs": "gcs",
    "az": "azure",
    "abfs": "azure",
    "abfss": "azure",
}
"""Protocols whose packages are installed by an extra of this package."""


def shown_url(url: str) -> str:
    """The URL as it may be shown and stored: normalised, without credentials. Raises ConfigurationError."""
    if not isinstance(url, str) or not url.strip():
        raise ConfigurationError(
            f"{url!r} is not a run URL. Use a URL such as 's3://bucket/runs/mrpc', or a folder."
        )
    if not is_local(url):
        return redact(url.rstrip("/"))
    return f"file://{local_path(url)}" if "://" in url else local_path(url)


def protocol_of(url: str) -> str:
    """The fsspec protocol of a URL. Raises ConfigurationError where the URL contains credentials."""
    if is_local(url):
        return "file"
    scheme = url.partition("://")[0]
    if has_user_part(url) and scheme in EXTRAS:
        raise ConfigurationError(
            f"The run URL {shown_url(url)!r} contains credentials. Remove them, and use the environment, a profile or "
            "storage_options instead: URLs end up in logs."
        )
    return scheme


def is_local(url: str) -> bool:
    """Whether a URL names a folder of this machine: `file://`, or a plain path."""
    scheme, separator, _ = url.partition("://")
    return not separator or scheme in ("file", "local")


def local_path(url: str) -> str:
    """The absolute folder that a plain path or a `file://` URL names."""
    scheme, separator, rest = url.partition("://")
    return os.path.abspath(rest if separator else os.path.expanduser(scheme)) or "/"


def missing_extra(protocol: str, reason: str) -> MissingExtraError:
    """The error for a protocol whose packages are missing, with the command that installs them."""
    extra = EXTRAS.get(protocol)
    command = f"pip install 'hf_cloudtrain[{extra}]'" if extra else "install the package that fsspec names"
    return MissingExtraError(
        f"{protocol + '://'!r} needs packages that are not installed: {command} ({reason})."
    )
