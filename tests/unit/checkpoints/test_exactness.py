"""The three answers, which outweighs which, and what a user reads."""

from __future__ import annotations

import itertools

import pytest

from hf_cloudtrain.checkpoints.exactness import EXACT, Exactness

NO = Exactness.no("the optimizer is left out")
UNKNOWN = Exactness.not_verified("EMA may keep state")


def test_no_outweighs_not_verified_and_that_outweighs_yes() -> None:
    for order in itertools.permutations([EXACT, UNKNOWN, NO]):
        assert order[0] & order[1] & order[2] == NO
    assert EXACT & UNKNOWN == UNKNOWN & EXACT == UNKNOWN
    assert EXACT & EXACT == EXACT


def test_of_two_equal_answers_the_first_reason_stays() -> None:
    assert (NO & Exactness.no("b")).reason == "the optimizer is left out"


@pytest.mark.parametrize(
    ("found", "text", "word"),
    [
        (EXACT, "yes", "exact"),
        (NO, "no: the optimizer is left out", "not exact"),
        (UNKNOWN, "not verified: EMA may keep state", "exactness not verified"),
        (Exactness(None), "not verified: no reason is recorded", "exactness not verified"),
        (Exactness.no("\x1b[2J"), "no: \\x1b[2J", "not exact"),
    ],
)
def test_words(found: Exactness, text: str, word: str) -> None:
    assert (str(found), found.word) == (text, word)


def test_what_is_not_verified_names_the_command_that_finds_out() -> None:
    assert "`cloudtrain verify-resume -- COMMAND` finds out" in UNKNOWN.sentence
    assert "verify-resume" not in NO.sentence
