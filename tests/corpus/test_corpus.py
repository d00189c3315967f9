"""Training set-ups of many kinds, each killed, resumed and compared: what the manifest says is what the weights say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hf_cloudtrain.checkpoints.exactness import EXACT, Exactness
from tests.corpus import _table
from tests.corpus._answers import ANSWERS, not_verified, yes
from tests.corpus._harness import ATTEMPTS, Outcome, measure
from tests.integration._zygote import Zygote

UPDATE = "python -m tests.corpus writes measured.json and the table in docs/guarantees.md"


def each_setup() -> Any:
    for name, answer in ANSWERS.items():
        marks = [] if answer.fast else [pytest.mark.slow]
        if answer.todo:
            marks.append(pytest.mark.xfail(strict=True, reason=answer.todo))
        yield pytest.param(name, id=name.replace(" ", "-"), marks=marks)


@pytest.mark.parametrize("name", list(each_setup()))
def test_the_manifest_says_what_the_weights_say(name: str, scripts: Zygote, tmp_path: Path) -> None:
    answer = ANSWERS[name]
    # The fast half leaves out the second uninterrupted run; make test-slow has it for all of them.
    outcome = measure(scripts, name, tmp_path, twin=not answer.fast)
    assert outcome.fault is None, (
        f"{outcome.fault}: differs by {outcome.difference}, recorded {outcome.recorded}"
    )
    assert answer.problem(outcome.recorded) is None
    listed = _table.read()[name]
    assert (outcome.is_exact, outcome.recorded.exact) == (listed.is_exact, listed.recorded.exact), UPDATE


def test_every_script_has_an_answer(scripts: Zygote) -> None:
    child = scripts.start(ATTEMPTS, "names")
    assert child.wait() == 0, child.log
    assert child.value == sorted(ANSWERS)


def test_nine_of_ten_exact_set_ups_are_known_to_be_exact() -> None:
    exact = [outcome.recorded.exact for outcome in _table.read().values() if outcome.is_exact]
    assert len(exact) >= 40
    assert exact.count(True) >= 0.9 * len(exact)
    assert exact.count(False) == 0


def test_nothing_in_the_table_is_wrong_but_what_is_known_to_be_missing() -> None:
    wrong = {name for name, outcome in _table.read().items() if outcome.fault}
    assert wrong <= {name for name, answer in ANSWERS.items() if answer.todo}


def test_the_table_on_the_page_is_what_was_measured() -> None:
    outcomes = _table.read()
    assert list(outcomes) == list(ANSWERS), UPDATE
    assert _table.page(outcomes) == _table.PAGE.read_text(), UPDATE


def test_a_planted_change_of_the_table_is_found() -> None:
    name, *_ = outcomes = _table.read()
    outcomes[name] = Outcome(1e-9, EXACT)
    assert _table.page(outcomes) != _table.PAGE.read_text()
    assert "(false true)" in _table.table(outcomes)


def test_there_are_set_ups_of_all_answers() -> None:
    answers = [answer.exact for answer in ANSWERS.values()]
    assert len(answers) >= 60
    assert min(answers.count(True), answers.count(False), answers.count(None)) >= 10


# The harness finds what it is there to find.


def test_a_planted_false_yes_is_found(scripts: Zygote, tmp_path: Path) -> None:
    outcome = measure(scripts, "augmentation that draws from torch", tmp_path, plant="yes")
    assert outcome.difference > 1e-5
    assert outcome.fault == "false true"
    assert yes().problem(outcome.recorded) is None


def test_a_planted_false_reason_is_found(scripts: Zygote, tmp_path: Path) -> None:
    outcome = measure(scripts, "a list of samples", tmp_path, plant="the moon is full")
    assert outcome.is_exact
    assert outcome.fault == "false reason"
    assert yes().problem(outcome.recorded) == "expected yes '', recorded: no: the moon is full"


@pytest.mark.parametrize(
    ("outcome", "fault"),
    [
        (Outcome(1e-9, EXACT), "false true"),
        (Outcome(float("inf"), EXACT), "false true"),
        (Outcome(0.0, Exactness.no("x")), "false reason"),
        (Outcome(0.0, EXACT, by_itself=1e-9), "differs by itself"),
        (Outcome(0.0, EXACT), None),
        (Outcome(1e-9, Exactness.no("x")), None),
        (Outcome(1e-9, Exactness.not_verified("x")), None),
        (Outcome(0.0, Exactness.not_verified("x")), None),
    ],
)
def test_what_is_a_fault(outcome: Outcome, fault: str | None) -> None:
    assert outcome.fault == fault


def test_a_reason_must_name_what_the_user_would_look_for() -> None:
    recorded = Exactness.not_verified("the data set Curriculum keeps state")
    assert not_verified("Curriculum").problem(recorded) is None
    assert not_verified("Epochs").problem(recorded)
    assert yes().problem(recorded)
