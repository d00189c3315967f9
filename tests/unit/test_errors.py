"""The tree of exceptions is as documented, and exceptions can be sent between processes."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

from hf_cloudtrain import errors
from hf_cloudtrain.errors import CloudTrainError

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, CloudTrainError)]


def drawn() -> dict[str, tuple[str, str | None]]:
    """name -> (parent, built-in base) as in the docstring."""
    found: dict[str, tuple[str, str | None]] = {}
    above = ["CloudTrainError"]
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"((?:│ {3}| {4})*)[├└]── (\w+)(?: \((\w+)\))?", line)
        if match:
            depth = len(match[1]) // 4 + 1
            above[depth:] = [match[2]]
            found[match[2]] = (above[depth - 1], match[3])
    return found


def test_the_documented_tree_is_the_real_one() -> None:
    real = {
        kind.__name__: (
            kind.__bases__[0].__name__,
            kind.__bases__[1].__name__ if len(kind.__bases__) > 1 else None,
        )
        for kind in KINDS
        if kind is not CloudTrainError
    }
    assert drawn() == real


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_exception_keeps_its_class_and_message_between_processes(kind: type[CloudTrainError]) -> None:
    error = kind("could not reach 's3://bucket'")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == "could not reach 's3://bucket'"


def test_a_full_disk_keeps_its_errno() -> None:
    error = errors.StorageError(28, "no space is left")
    assert pickle.loads(pickle.dumps(error)).errno == 28
