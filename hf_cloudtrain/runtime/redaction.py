"""Redaction of texts that may contain credentials: URLs, options, command lines, error messages."""

from __future__ import annotations

import json
import os
import re
from typing import Any

_TOKEN = r"token(?!iz)"  # noqa: S105 - a pattern; not of a tokenizer
_KEY = r"(?<!mon)(?<!tur)(?<!hot)(?<!whis)key(?!board|word|frame|note|stone)"
_PASSWORD = r"pass(?:w|phrase|code)"  # noqa: S105 - a pattern
SECRET_NAME = re.compile(
    rf"{_TOKEN}|secret|{_PASSWORD}|{_KEY}|credential|auth(?!or)|bearer|connection.?string|storage.?options|signature|"
    r"\bsas\b|\bsig\b|\bpat\b|\bpwd\b",
    re.IGNORECASE,
)
"""Names of options and arguments whose values are not shown."""

MIN_LENGTH = 8
"""Characters of the shortest variable that counts as a secret: `false` and `1` occur in many texts."""

# What a sentence about a secret continues with. A password that is one of these words is none.
_WORD = (
    r"(?!(?:an?|access|all|and|are|authentication|be|but|by|can|cannot|check|could|default|denied|did|does|empty|error|expected|"
    r"expired|fail\w*|false|for|from|has|have|if|in|incorrect|invalid|is|it|its|login|malformed|mismatch|missing|must|no|none|not|"
    r"null|of|or|please|provided?|provide|refresh\w*|refused|request|required|retry|run|see|set|should|the|this|to|true|unable|"
    r"unauthorized|unavailable|undefined|unknown|use|using|was|were|when|with|wrong|you|your)(?=[.,;:!?)]*(?:\s|$))"
    r"|\w*credentials?(?=[.,;:!?)]*(?:\s|$)))"
)
# Special tokens of a vocabulary, and numbers of tokens, are no secrets.
_ORDINARY = (
    r"(?!(?:pad|eos|bos|unk|cls|sep|mask|image|additional_special)_tokens?\b)"
    r"(?!(?:[\w-]*[_-])?tokens['\"]?\s*[=:]\s*\d+\b)"
)
# On hostile text the time of these patterns grows with its length, not with its square: a lookahead finds the word in a
# name once, and the length of a user or a token is limited.
_PARAMETER = re.compile(
    rf"((?:^|[?&;\s]|(?<=\s)--?|^--?){_ORDINARY}"
    rf"(?=[\w-]*?(?:(?<![a-z])sig(?![a-z])|signature|{_TOKEN}|secret|{_PASSWORD}|{_KEY}|credential|auth(?!or)))[\w-]+=)"
    rf"(?!(?:none|null|true|false)(?![^&\s'\";]))[^&\s'\";]+",
    re.IGNORECASE,
)
# As clients print their options and headers. Not any 'Key', which in S3 is the name of an object, and not the name of
# an exception such as NoCredentialsError.
_FIELD = re.compile(
    rf"((?<![\w-])(?![\w-]*(?-i:Error|Exception)\b){_ORDINARY}"
    rf"(?=[\w-]*?(?:{_TOKEN}|secret|passw|credential|access_?key|account_?key|api_?key|private_?key|authorization))[\w-]+['\"]?\s*:\s*"
    rf"(?:['\"]|{_WORD})(?:bearer |basic )?)[^'\",\s}}]+",
    re.IGNORECASE,
)
# Tokens of hubs and clouds, recognised by their shape.
_SHAPE = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|(?:AKIA|ASIA)[A-Z0-9]{16}|gh[oprsu]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|glpat-[\w-]{20,}|"
    r"sk-[\w-]{20,}|xox[abprs]-[\w-]{20,}|eyJ[\w-]{10,2000}\.eyJ[\w-]+(?:\.[\w-]+)?)"
)
# Up to the last "@", because a secret key may contain a slash; digits alone after the colon are a port.
_USER = re.compile(r"(\w://)([^/@\s]*:(?!\d+(?:/|$))\S{0,2048})@")


def redact(text: str, secrets: tuple[str, ...] = ()) -> str:
    """The text without users in URLs, values of secret parameters and fields, tokens, and `secrets`.

    Example:
        >>> redact("s3://AKIA:abc@bucket/run and https://host/c?sv=1&sig=abc")
        's3://***@bucket/run and https://host/c?sv=1&sig=***'
    """
    for secret in secrets:
        text = text.replace(secret, "***")
    for pattern, shown in ((_USER, r"\1***@"), (_PARAMETER, r"\1***"), (_FIELD, r"\1***"), (_SHAPE, "***")):
        text = pattern.sub(shown, text)
    return text


def visible(text: str) -> str:
    """The text with all invisible characters escaped: a name that contains ESC must not move the cursor."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def has_user_part(url: str) -> bool:
    """Whether a URL contains a user and a password."""
    return _USER.search(url) is not None


def secrets_in(url: str, options: dict[str, Any]) -> tuple[str, ...]:
    """The secret values in a URL and in storage options, the longest first, because one may contain another."""
    found = set(_secret_values(options))
    user = _USER.search(url)
    if user is not None:
        found |= {user[2], user[2].partition(":")[2]}
    return tuple(sorted((secret for secret in found if len(secret) > 3), key=len, reverse=True))


def secrets_of_environment() -> tuple[str, ...]:
    """The values of variables with secret names, the longest first. Paths and numbers are not secrets."""
    found = set()
    for name, value in os.environ.items():
        if SECRET_NAME.search(name):
            found |= {value, *_secret_values({name: value}), *_secret_values(_object(value))}
    return tuple(sorted(filter(_may_be_secret, found), key=len, reverse=True))


def _may_be_secret(value: str) -> bool:
    return len(value) >= MIN_LENGTH and value[0] not in "/~." and "://" not in value and not value.isdigit()


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text) if text.startswith("{") else None
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {}


def _secret_values(options: dict[str, Any]) -> list[str]:
    found = []
    for name, value in options.items():
        if isinstance(value, dict):
            found += _secret_values(value)
        elif isinstance(value, str) and SECRET_NAME.search(name):
            pairs = (part.partition("=") for part in value.split(";"))
            found += [value, *(secret for key, _, secret in pairs if SECRET_NAME.search(key))]
    return found
