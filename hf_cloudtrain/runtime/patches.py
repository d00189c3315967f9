"""What changed between two versions of a document of JSON, so that a browser receives only what is new.

    {"value": x}                          the value is x now
    {"keys": {key: patch}, "gone": [..]}  of an object: keys that changed, and keys that are gone
    {"items": {index: patch}}             of a list of objects with as many entries as before
    {"keep": n, "rest": [..]}             of a list: the first n entries stay, the rest follows

`apply` in ui/static/page.js is the other half.
"""

from __future__ import annotations

from typing import Any

Patch = dict[str, Any]


def patch(old: Any, new: Any) -> Patch | None:
    """What makes `new` of `old`; None where they are equal.

    Example:
        >>> patch({"step": 4, "loss": [3, 2]}, {"step": 5, "loss": [3, 2, 1]})
        {'keys': {'step': {'value': 5}, 'loss': {'keep': 2, 'rest': [1]}}, 'gone': []}
    """
    if old is new:
        return None
    if isinstance(old, dict) and isinstance(new, dict):
        keys = {key: {"value": new[key]} for key in new if key not in old}
        both = ((key, patch(old[key], new[key])) for key in new if key in old)
        keys |= {key: change for key, change in both if change is not None}
        gone = [key for key in old if key not in new]
        return {"keys": keys, "gone": gone} if keys or gone else None
    if isinstance(old, list) and isinstance(new, list):
        return _of_list(old, new)
    return {"value": new} if _differs(old, new) else None


def _of_list(old: list[Any], new: list[Any]) -> Patch | None:
    if new and len(old) == len(new) and all(isinstance(item, dict) for item in (*old, *new)):
        changes = {str(index): patch(*pair) for index, pair in enumerate(zip(old, new, strict=True))}
        items = {index: change for index, change in changes.items() if change is not None}
        return {"items": items} if items else None
    pairs = enumerate(zip(old, new, strict=False))
    keep = next((index for index, (left, right) in pairs if _differs(left, right)), min(len(old), len(new)))
    return None if keep == len(old) == len(new) else {"keep": keep, "rest": new[keep:]}


def _differs(old: Any, new: Any) -> bool:
    """To Python, False equals 0 and True equals 1, in lists and dicts too; to JSON they do not."""
    if old != new or type(old) is not type(new):
        return True
    return isinstance(old, (list, dict)) and patch(old, new) is not None
