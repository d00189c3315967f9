"""TODO docstring."""

from __future__ import annotations

import re

from hf_cloudtrain.errors import (
    ManifestError,
)

META = ".cloudtrain"
"""Folder of our own records, below a run URL and below an output folder."""


DIGEST_ALGORITHM = "xxh3-128"
"""10 GB/s a core, where sha256 at 1.2 would cost more than the upload."""


def clean_path(path: str) -> str:
    """The path itself, if it can only lead below its folder. Raises ManifestError otherwise."""
    parts = path.split("/")
    if (
        not path
        or len(path) > 1024
        or any(part in ("", ".", "..") or len(part.encode("utf-8", "replace")) > 255 for part in parts)
        or "\\" in path
        or any(ord(char) < 32 or 0x7F <= ord(char) < 0xA0 or 0xD800 <= ord(char) <= 0xDFFF for char in path)
        or re.match(r"[A-Za-z]:", path)
        or parts[0].casefold() == META
    ):
        raise ManifestError(f"{path[:200]!r} is not a clean relative path.")
    return path
