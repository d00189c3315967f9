"""Messages are shown once, above bars, at the level that the user chose."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers.utils import logging as of_transformers

from hf_cloudtrain import env
from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.integrations import messages

OWN = logging.getLogger("hf_cloudtrain")
SCRIPT = """
import logging, sys
from hf_cloudtrain.integrations.messages import expect_use, show_messages, used
{before}
show_messages()
show_messages()
logging.getLogger("hf_cloudtrain.storage").warning("one line")
{after}
"""


@pytest.fixture(autouse=True)
def fresh_logger() -> Iterator[None]:
    level, handlers = OWN.level, OWN.handlers[:]
    OWN.setLevel(logging.NOTSET)
    yield
    OWN.setLevel(level)
    OWN.handlers[:] = handlers


def stderr_of(tmp_path: Path, *, before: str = "", after: str = "") -> list[str]:
    script = SCRIPT.format(before=before, after=after)
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True, cwd=tmp_path
    )
    return done.stderr.splitlines()


class TestPlainScript:
    def test_a_message_is_shown_once(self, tmp_path: Path) -> None:
        assert stderr_of(tmp_path) == ["[hf_cloudtrain] one line"]

    def test_a_handler_of_the_user_shows_it_instead(self, tmp_path: Path) -> None:
        assert stderr_of(tmp_path, before="logging.basicConfig(format='mine %(message)s')") == [
            "mine one line"
        ]
        on_ours = "logging.getLogger('hf_cloudtrain').addHandler(logging.StreamHandler())"
        assert stderr_of(tmp_path, before=on_ours) == ["one line"]
        later = "logging.basicConfig(); logging.getLogger('hf_cloudtrain.x').info('two')"
        assert stderr_of(tmp_path, after=later)[1:] == ["INFO:hf_cloudtrain.x:two"]

    def test_what_is_not_used_is_named_at_the_end_unless_an_error_ends_the_script(
        self, tmp_path: Path
    ) -> None:
        two = "expect_use('s3://b/one', 'Use it.'); expect_use('s3://b/two', 'Use it.'); used('s3://b/two')"
        named = "[hf_cloudtrain] Nothing was trained for the run s3://b/one, so nothing was uploaded. Use it."
        assert stderr_of(tmp_path, after=two)[1:] == [named]
        assert not [
            line for line in stderr_of(tmp_path, after=f"{two}\n1 / 0") if "Nothing was trained" in line
        ]


class TestLevel:
    @pytest.mark.parametrize(
        ("variable", "verbosity", "expected"),
        [
            ("", logging.WARNING, logging.INFO),
            ("", logging.ERROR, logging.ERROR),
            ("", logging.DEBUG, logging.DEBUG),
            ("warning", logging.DEBUG, logging.WARNING),
            ("Debug", logging.ERROR, logging.DEBUG),
        ],
    )
    def test_is_that_of_the_variable_or_of_transformers(
        self, monkeypatch: pytest.MonkeyPatch, variable: str, verbosity: int, expected: int
    ) -> None:
        monkeypatch.setenv(env.LOG, variable)
        monkeypatch.setattr(of_transformers, "get_verbosity", lambda: verbosity)
        messages.show_messages()
        assert OWN.level == expected

    def test_that_the_user_gave_the_logger_stays(self, monkeypatch: pytest.MonkeyPatch) -> None:
        OWN.setLevel(logging.CRITICAL)
        messages.show_messages()
        assert OWN.level == logging.CRITICAL

    def test_that_does_not_exist_is_refused_by_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(env.LOG, "loud")
        with pytest.raises(ConfigurationError, match="HF_CLOUDTRAIN_LOG='loud' must be one of: debug, info"):
            messages.show_messages()


def test_a_closed_stderr_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(logging, "raiseExceptions", False)
    messages.show_messages()
    OWN.handlers[:] = [messages._handler]
    logging.getLogger("hf_cloudtrain.x").warning("into nothing")
