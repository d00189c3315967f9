"""What a user sees first and last: one line each, and an error where the callback was forgotten."""

from __future__ import annotations

import pytest

from tests.integration._lab import Lab

MISHAPS = "tests.integration._mishaps"


def lines(log: str, prefix: str = "[hf_cloudtrain] ") -> list[str]:
    return [line.removeprefix(prefix) for line in log.splitlines() if line.startswith(prefix)]


class TestSignsOfLife:
    def test_the_first_and_the_last_line_of_a_new_run(self, lab: Lab) -> None:
        said = lines(lab.train("first").log)
        assert said == [
            f"Run {lab.run_url}, attempt 1: starts at step 0 of 12, because the run is new; saves every 4 steps.",
            (
                f"Run {lab.run_url}: 3 checkpoints are committed, the newest at step 12. Look at it with `cloudtrain run status "
                f"{lab.run_url}`."
            ),
        ]

    def test_a_resume_says_what_was_restored_and_how_exact_it_is(self, lab: Lab) -> None:
        inexact = {"save_only_model": True, "save_strategy": "epoch"}
        lab.killed("first", kill_at=8, committed=6, **inexact)
        said = lines(lab.train("second", **inexact).log)
        (first,) = (line for line in said if ", attempt 2: " in line)
        assert "resumes from checkpoint-6 (attempt 1, exact: no) at step 6 of 12;" in first
        assert first.endswith("at step 6 of 12; saves at the end of each epoch.")
        assert "2 checkpoints are committed, the newest at step 12." in said[-1]

    def test_a_complete_run_says_that_nothing_is_left_to_train(self, lab: Lab) -> None:
        lab.train("first")
        said = lines(lab.train("second").log)
        (first,) = (line for line in said if ", attempt 2: " in line)
        assert first.endswith("at step 12 of 12; nothing is left to train.")

    def test_ranks_other_than_0_say_nothing(self, lab: Lab) -> None:
        ranks = lab.start_ranks("first", per_device_train_batch_size=2)
        assert [rank.wait() for rank in ranks] == [0, 0]
        assert [len([line for line in lines(rank.log) if line.startswith("Run ")]) for rank in ranks] == [
            2,
            0,
        ]

    @pytest.mark.parametrize(
        ("variables", "expected"),
        [({"HF_CLOUDTRAIN_LOG": "warning"}, 0), ({"TRANSFORMERS_VERBOSITY": "error"}, 0), ({}, 2)],
    )
    def test_a_variable_and_the_verbosity_of_transformers_decide(
        self, lab: Lab, variables: dict[str, str], expected: int
    ) -> None:
        child = lab.train("first", "verbosity", module=MISHAPS, env=variables)
        assert len(lines(child.log)) == expected

    def test_logging_of_the_users_own_shows_each_line_once(self, lab: Lab) -> None:
        log = lab.train("first", "with_logging", module=MISHAPS, level="WARNING").log
        assert len(lines(log, "mine INFO Run ")) == 2
        assert log.count(", attempt 1: ") == 1

    def test_a_long_wait_says_what_it_waits_for(self, lab: Lab) -> None:
        said = lines(lab.train("first", "slow_check", module=MISHAPS).log)
        assert f"Waiting for more than 0 s to reach '{lab.run_url}'." in said[0]


class TestForgottenCallback:
    def test_restore_without_the_callback_is_an_error_at_the_first_step(self, lab: Lab) -> None:
        log = lab.fails("first", "forgets_the_callback", module=MISHAPS)
        assert "Create it with Trainer(…, callbacks=[cloud])." in log.splitlines()[-1]
        assert "'loss'" not in log
        assert not list(lab.machine("first").glob("checkpoint-*"))

    def test_a_training_with_other_arguments_goes_on(self, lab: Lab) -> None:
        child = lab.train("first", "forgets_the_callback", module=MISHAPS, parts="elsewhere")
        assert "'loss'" in child.log

    def test_a_callback_that_is_never_used_is_named_at_the_end(self, lab: Lab) -> None:
        said = lines(lab.train("first", "forgets_the_callback", module=MISHAPS, parts="never").log)
        assert said == [
            (
                f"Nothing was trained for the run {lab.run_url}, so nothing was uploaded. Pass the callback to Trainer: "
                "Trainer(…, callbacks=[cloud])."
            )
        ]
