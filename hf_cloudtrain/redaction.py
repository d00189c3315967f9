"""What may be shown and stored of texts that can carry credentials: URLs, options, command lines, error messages."""

from __future__ import annotations

import re
from typing import Any

SECRET_NAME = re.compile(
    r"token|secret|passw|key|credential|connection.?string|storage.?options|signature|\bsas\b|\bsig\b",
    re.IGNORECASE,
)
"""Names of options and arguments whose values are not shown."""

_PARAMETER = re.compile(
    r"((?:^|[?&;\s])[\w-]*(?:sig|token|secret|passw|key|credential)[\w-]*=)[^&\s'\";]+", re.IGNORECASE
)
# Up to the last "@", because a secret key may have a slash; digits alone after the colon are a port.
_USER = re.compile(r"(\w://)([^/@\s]*:(?!\d+(?:/|$))\S*)@")


def redact(text: str, secrets: tuple[str, ...] = ()) -> str:
    """The text without the user part of URLs, without the values of secret parameters, and without `secrets`.

    Example:
        >>> redact("s3://AKIA:abc@bucket/run and https://host/c?sv=1&sig=abc")
        's3://***@bucket/run and https://host/c?sv=1&sig=***'
    """
    for secret in secrets:
        text = text.replace(secret, "***")
    return _PARAMETER.sub(r"\1***", _USER.sub(r"\1***@", text))


def has_user_part(url: str) -> bool:
    """Whether a URL carries a user and a password."""
    return _USER.search(url) is not None


def secrets_in(url: str, options: dict[str, Any]) -> tuple[str, ...]:
    """The secret values in a URL and in storage options, the longest first, so that none leaves a piece of another."""
    found = set(_secret_values(options))
    user = _USER.search(url)
    if user is not None:
        found |= {user[2], user[2].partition(":")[2]}
    return tuple(sorted((secret for secret in found if len(secret) > 3), key=len, reverse=True))


def _secret_values(options: dict[str, Any]) -> list[str]:
    found = []
    for name, value in options.items():
        if isinstance(value, dict):
            found += _secret_values(value)
        elif isinstance(value, str) and SECRET_NAME.search(name):
            pairs = (part.partition("=") for part in value.split(";"))
            found += [value, *(secret for key, _, secret in pairs if SECRET_NAME.search(key))]
    return found
