"""An expected error inside `trainer.train()` shows at most two frames of ours below Trainer's, and our sentence last."""

from __future__ import annotations

import re

from tests.integration._lab import Lab

MOST_FRAMES = 2
MISHAPS = "tests.integration._mishaps"


def check_short(shown: str, sentence: str) -> None:
    """Whether what a process wrote ends with a short traceback."""
    lines = shown.rstrip().splitlines()
    assert re.match(rf"hf_cloudtrain\.errors\.{sentence}", lines[-1]), shown
    assert shown.count("Traceback (most recent call last)") == 1, shown
    assert "During handling of" not in shown, shown
    frames = [line for line in lines if line.startswith('  File "')]
    trainers = [number for number, frame in enumerate(frames) if "/transformers/" in frame]
    below = frames[trainers[-1] + 1 :]
    assert 1 <= len(below) <= MOST_FRAMES, shown
    assert all("/hf_cloudtrain/" in frame for frame in below), shown


def test_a_script_that_forgets_to_restore(lab: Lab) -> None:
    lab.train("first")
    output = lab.fails("second", restore="forgotten")
    check_short(output, r"RunHasCheckpointsError: .*cloud\.restore\(args\)")


def test_a_training_that_would_never_save(lab: Lab) -> None:
    output = lab.fails("first", save_strategy="no", restore="forgotten")
    check_short(output, r"ConfigurationError: save_strategy='no' never saves a checkpoint")


def test_a_training_that_was_overtaken(lab: Lab) -> None:
    child = lab.start("first", "zombie", module=MISHAPS, at=6, env={"HF_CLOUDTRAIN_HEARTBEAT": "0.1"})
    lab.wait_until(lambda: lab.steps() == [4] or child.poll() is not None)
    lab.catalog.attempts.begin(0.0, 4, None, {})
    assert child.wait() == 1, child.log
    check_short(child.log, r"OvertakenError: .*was overtaken by attempt 2")


def test_a_training_whose_last_checkpoint_is_not_committed(lab: Lab) -> None:
    env = {"HF_CLOUDTRAIN_DRAIN_TIMEOUT": "1"}
    output = lab.fails("first", "outage", module=MISHAPS, first=5, last=None, env=env)
    check_short(output, r"NotCommittedError: Not on storage yet: checkpoint-12 .*cloudtrain checkpoint flush")
