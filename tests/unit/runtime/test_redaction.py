"""Texts that `redact` leaves as they are. tests/laws/test_law_11_secrets.py tests that it hides credentials."""

from __future__ import annotations

import pytest

from hf_cloudtrain.runtime.redaction import redact


@pytest.mark.parametrize(
    "text",
    [
        "NoCredentialsError: Unable to locate credentials",
        "UnauthorizedSSOTokenError: The SSO session has expired",
        "checkpoint-5/tokenizer.json: 5 bytes",
        "http://host:9000/a@b",
    ],
)
def test_a_text_without_a_secret_stays_as_it_is(text: str) -> None:
    assert redact(text) == text
