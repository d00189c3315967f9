"""An expected error of ours, or Ctrl-C, leaves a public function with one frame; a bug keeps its whole traceback."""

from __future__ import annotations

import inspect
import logging
import traceback

import pytest

from hf_cloudtrain.errors import StorageError
from hf_cloudtrain.runtime.threads import in_threads
from hf_cloudtrain.runtime.tracebacks import short_traceback


def fail(error: BaseException) -> None:
    try:
        raise KeyError("of a client")
    except KeyError as cause:
        raise error from cause


@short_traceback
def public(error: BaseException) -> None:
    """Documented."""
    in_threads(fail, ([error], 1))


@pytest.mark.parametrize(
    ("error", "last"),
    [
        (StorageError("Could not write."), "hf_cloudtrain.errors.StorageError: Could not write.\n"),
        (KeyboardInterrupt(), "KeyboardInterrupt\n"),
    ],
)
def test_an_error_of_ours_and_ctrl_c_have_no_inner_frames_and_no_causes(
    error: BaseException, last: str
) -> None:
    with pytest.raises(type(error)) as raised:
        public(error)
    shown = traceback.format_exception(raised.value)
    assert [frame.name for frame in traceback.extract_tb(raised.value.__traceback__)] == [
        "test_an_error_of_ours_and_ctrl_c_have_no_inner_frames_and_no_causes",
        "public",
    ]
    assert shown[-1] == last
    assert "of a client" not in "".join(shown)


def test_the_whole_traceback_is_in_the_log_at_debug_level(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "hf_cloudtrain"), pytest.raises(StorageError):
        public(StorageError("Could not write."))
    assert "KeyError: 'of a client'" in caplog.text
    assert "in fail" in caplog.text


def test_a_bug_keeps_its_traceback_and_its_cause() -> None:
    with pytest.raises(ZeroDivisionError) as raised:
        public(ZeroDivisionError())
    assert isinstance(raised.value.__cause__, KeyError)
    assert traceback.extract_tb(raised.value.__traceback__)[-1].name == "fail"


def test_signature_and_docstring_stay() -> None:
    assert list(inspect.signature(public).parameters) == ["error"]
    assert public.__doc__ == "Documented."
