"""`import hf_cloudtrain`: exactly the promised names, each documented, and one clear sentence on Windows."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import hf_cloudtrain

NAMES = list(hf_cloudtrain.__all__)


def test_the_promised_names_are_sorted_and_unique() -> None:
    assert sorted(set(NAMES)) == NAMES


def test_dir_shows_the_promised_names_and_no_others() -> None:
    assert {name for name in dir(hf_cloudtrain) if not name.startswith("_")} == {
        name for name in NAMES if not name.startswith("_")
    }


def test_star_import_brings_every_promised_name() -> None:
    namespace: dict[str, object] = {}
    exec("from hf_cloudtrain import *", namespace)
    assert set(NAMES) <= set(namespace)


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_there_and_documented(name: str) -> None:
    value = getattr(hf_cloudtrain, name)
    assert not inspect.ismodule(value), "a module would change its meaning with what was imported before"
    if callable(value):
        assert value.__module__.startswith("hf_cloudtrain."), "another package's name is not ours to promise"
        # A class's own docstring, not the one of its base.
        assert (value.__doc__ or "").strip(), f"{name} has no docstring"


def test_an_unknown_name_is_an_attribute_error_that_names_it() -> None:
    with pytest.raises(AttributeError, match="CloudTrainCalback"):
        hf_cloudtrain.CloudTrainCalback  # noqa: B018 - the misspelling is the test


def test_the_package_tells_type_checkers_that_it_is_typed() -> None:
    assert (Path(hf_cloudtrain.__file__).parent / "py.typed").is_file()


def test_on_windows_the_import_ends_in_one_sentence_that_says_what_to_do() -> None:
    code = "import sys; sys.platform = 'win32'; import hf_cloudtrain.errors"
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(hf_cloudtrain.__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = ended.stderr.splitlines()
    assert lines[-1].startswith("ImportError: hf_cloudtrain does not run on Windows")
    assert "inside WSL" in lines[-1]
    assert len(lines) < 15
