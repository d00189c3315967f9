"""An expected error or Ctrl-C inside `trainer.train()` shows at most two frames of ours below Trainer's, and a sentence last."""

from __future__ import annotations

import re
import signal

from tests.integration._lab import Lab

MOST_FRAMES = 2
MISHAPS = "tests.integration._mishaps"


def check_short(shown: str, sentence: str) -> None:
    """Whether what a process wrote ends with a short traceback."""
    lines = shown.rstrip().splitlines()
    assert re.match(sentence, lines[-1]), shown
    assert shown.count("Traceback (most recent call last)") == 1, shown
    assert "During handling of" not in shown, shown
    frames = [line for line in lines if line.startswith('  File "')]
    others = [number for number, frame in enumerate(frames) if "/hf_cloudtrain/" not in frame]
    below = frames[others[-1] + 1 :]
    assert 1 <= len(below) <= MOST_FRAMES, shown


def test_a_script_that_forgets_to_restore(lab: Lab) -> None:
    lab.train("first")
    output = lab.fails("second", restore="forgotten")
    check_short(output, r"hf_cloudtrain\.errors\.RunHasCheckpointsError: .*cloud\.restore\(args\)")


def test_a_training_that_would_never_save(lab: Lab) -> None:
    output = lab.fails("first", save_strategy="no", restore="forgotten")
    check_short(
        output, r"hf_cloudtrain\.errors\.ConfigurationError: save_strategy='no' never saves a checkpoint"
    )


def test_a_training_that_was_overtaken(lab: Lab) -> None:
    child = lab.start("first", "zombie", module=MISHAPS, at=6, env={"HF_CLOUDTRAIN_HEARTBEAT": "0.1"})
    lab.wait_until(lambda: lab.steps() == [4] or child.poll() is not None)
    lab.catalog.attempts.begin(0.0, 4, None, {})
    assert child.wait() == 1, child.log
    check_short(child.log, r"hf_cloudtrain\.errors\.OvertakenError: .*was overtaken by attempt 2")


def test_a_training_whose_last_checkpoint_is_not_committed(lab: Lab) -> None:
    env = {"HF_CLOUDTRAIN_DRAIN_TIMEOUT": "1"}
    output = lab.fails("first", "outage", module=MISHAPS, first=5, last=None, env=env)
    check_short(
        output,
        r"hf_cloudtrain\.errors\.NotCommittedError: Not on storage yet: checkpoint-12 .*cloudtrain checkpoint flush",
    )


def test_ctrl_c_while_a_checkpoint_is_restored(lab: Lab) -> None:
    lab.train("first")
    child = lab.start("second", "ctrl_c", module=MISHAPS, where="restore")
    assert child.wait() == -signal.SIGINT, child.log
    check_short(child.log, r"KeyboardInterrupt$")
    assert lab.catalog.attempts.numbers() == [1], "none has begun"


def test_ctrl_c_when_an_attempt_has_just_begun_is_recorded(lab: Lab) -> None:
    child = lab.start("first", "ctrl_c", module=MISHAPS, where="begin")
    assert child.wait() == -signal.SIGINT, child.log
    check_short(child.log, r"KeyboardInterrupt$")
    beat = lab.catalog.attempts.read_progress(1) or {}
    assert (beat.get("state"), beat.get("step"), beat.get("total_steps")) == ("stopped", 0, 12)
