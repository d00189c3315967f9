"""Names of the folders of our own, and which paths below a run URL are safe."""

from __future__ import annotations

import functools
import re

from hf_cloudtrain.errors import ManifestError

META = ".cloudtrain"
"""Folder of our own records, below a run URL."""
LOCAL = "_cloudtrain"
"""Folder of our own files, below an output folder. Trainer's push to the Hub leaves out names that begin with `_`."""


@functools.lru_cache(maxsize=4096)
def clean_path(path: str) -> str:
    """The path itself, if it is relative and stays below its folder. Raises ManifestError otherwise."""
    parts = path.split("/")
    if (
        not path
        or len(path) > 1024
        or any(part in ("", ".", "..") or len(part.encode("utf-8", "replace")) > 255 for part in parts)
        or "\\" in path
        or any(ord(char) < 32 or 0x7F <= ord(char) < 0xA0 or 0xD800 <= ord(char) <= 0xDFFF for char in path)
        or re.match(r"[A-Za-z]:", path)
        or parts[0].casefold() in (META, LOCAL)
    ):
        raise ManifestError(f"{path[:200]!r} is not a clean relative path.")
    return path
