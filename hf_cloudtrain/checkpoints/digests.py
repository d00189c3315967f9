"""What a checkpoint was trained from, as short texts for its manifest: a digest of the model's names and shapes, with counts."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from hf_cloudtrain.storage.digest import Digest

MODEL = "model"
"""Key in a manifest's `origin`: the digest of the model."""
ARGUMENTS = "arguments"
"""Key in a manifest's `origin`: JSON of the arguments that decide the course of training."""
DATA = "data"
"""Key in a manifest's `origin`: JSON with the length and, where it is known, a fingerprint of the data."""
_MOST = 1_900
"""Characters of a text in `origin`, of which readers take 2,000."""


def digest_of_shapes(shapes: Iterable[tuple[str, Sequence[int]]]) -> str:
    """Of named shapes, in any order.

    Example:
        >>> digest_of_shapes([("weight", (2, 3)), ("bias", (2,))])
        '2 tensors, 8 values, xxh3-128:…'
    """
    digest, tensors, values = Digest(), 0, 0
    for name, shape in sorted((name, tuple(map(int, shape))) for name, shape in shapes):
        digest.update(f"{name}{shape}\n".encode())
        tensors, values = tensors + 1, values + math.prod(shape)
    return f"{tensors:,} tensors, {values:,} values, {digest}"


def digest_of(text: str) -> str:
    """Of a text."""
    digest = Digest()
    digest.update(text.encode())
    return str(digest)


def counts_of(digest: str) -> str:
    """The part of `digest_of_shapes` for people, from an untrusted text."""
    match = re.match(r"[\d,]{1,30} tensors, [\d,]{1,30} values", digest)
    return match[0] if match else "an unknown number of tensors"


def encode(facts: dict[str, Any]) -> str:
    """Short JSON for `origin`; drops facts from the end until it fits."""
    names = list(facts)
    while len(text := json.dumps({name: facts[name] for name in names}, default=str)) > _MOST:
        names.pop()
    return text


def decode(text: str | None) -> dict[str, Any]:
    """What `encode` returned, from an untrusted text; empty if it is missing or damaged."""
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
