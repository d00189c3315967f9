"""`cloudtrain run stop`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from hf_cloudtrain.tracking import stop
from tests.unit.cli.terminal import ESC, Run, answer, cloudtrain, sentence


class Meanwhile:
    """What a run does while the command waits: one thing between two looks, which are 10 s apart."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *deeds: Callable[[], object]) -> None:
        self.left = list(deeds)
        self.seconds = 0.0
        clock = SimpleNamespace(time=time.time, sleep=self._sleep, monotonic=lambda: self.seconds)
        monkeypatch.setattr(stop, "time", clock)

    def _sleep(self, _: float) -> None:
        self.seconds += 10.0
        self.left.pop(0)()


class TestRunStop:
    def test_asks_the_newest_attempt_and_says_so(self, run: Run) -> None:
        run.beat(2, step=420)
        result = cloudtrain("run", "stop", run.url)
        assert result.stdout == ""
        assert result.stderr.startswith(f"Asked attempt 2 of {run.url!r} to stop.")
        assert result.stderr.count("\n") == 1
        assert run.catalog.attempts.stop_requested(2)
        assert not run.catalog.attempts.stop_requested(3)
        record = json.loads((run.folder / ".cloudtrain/stop.json").read_text())
        assert record["user"]
        assert record["host"]
        assert abs(record["time"] - time.time()) < 3600

    def test_a_user_without_a_name_can_ask_too(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        def nameless() -> str:
            raise KeyError("getpwuid(): uid not found: 12345")  # as in a container; OSError since Python 3.13

        monkeypatch.setattr("getpass.getuser", nameless)
        cloudtrain("run", "stop", run.url)
        assert run.catalog.attempts.stop_requested(2)

    def test_prints_the_state_as_json(self, run: Run) -> None:
        run.beat(2, step=420, last_committed="000002-0000000400")
        assert answer("run", "stop", run.url) | {"last_seen": None} == {
            "run_url": run.url,
            "attempt": 2,
            "state": "training",
            "step": 420,
            "last_committed": "000002-0000000400",
            "last_seen": None,
        }

    def test_asks_an_attempt_that_has_no_heartbeat_yet(self, empty: Run) -> None:
        empty.begin()
        assert answer("run", "stop", empty.url)["state"] == "started"
        assert empty.catalog.attempts.stop_requested(1)

    @pytest.mark.parametrize("state", ["finished", "failed", "stopped", f"{ESC}training"])
    def test_is_refused_if_the_attempt_has_ended(self, empty: Run, state: str) -> None:
        empty.begin()
        empty.beat(1, step=7, state=state, last_committed="000001-0000000007")
        text = sentence("run", "stop", empty.url)
        assert "No stop request was sent" in text
        assert "checkpoint-7.a1" in text
        assert "at step 7" in text
        assert ESC not in text
        assert not empty.catalog.attempts.stop_requested(1)

    def test_without_a_run_is_an_error(self, empty: Run) -> None:
        assert f"run at {empty.url!r}" in sentence("run", "stop", empty.url)
        assert not empty.folder.exists()

    def test_an_attempt_with_an_old_heartbeat_is_asked_with_a_warning(self, empty: Run) -> None:
        """Its clock may be wrong, or ours, so a request to a running attempt must not depend on them."""
        empty.begin()
        empty.beat(1, ago=7 * 3600, step=7)
        asked = cloudtrain("run", "stop", empty.url)
        assert "Warning: by this machine's clock its last heartbeat is 7 h old" in asked.stderr
        assert empty.catalog.attempts.stop_requested(1)

    @pytest.mark.parametrize("ago", [0, 7 * 3600, -7 * 3600])
    def test_waits_until_it_has_stopped_whatever_the_clocks_show(
        self, empty: Run, monkeypatch: pytest.MonkeyPatch, ago: float
    ) -> None:
        empty.begin()
        empty.beat(1, ago=ago, step=100)
        beats = [lambda step=step: empty.beat(1, ago=ago, step=step) for step in range(101, 120)]
        meanwhile = Meanwhile(
            monkeypatch,
            lambda: empty.catalog.attempts.stop_requested(1) or pytest.fail("waits without having asked"),
            *beats,
            lambda: empty.beat(1, ago=ago, state="preempted", step=119, last_committed="000001-0000000119"),
        )
        result = cloudtrain("run", "stop", empty.url, "--wait", "--json")
        assert meanwhile.left == []
        assert (
            "attempt 1 saved and stopped at step 119, last committed checkpoint: checkpoint-119.a1."
            in result.stderr
        )
        assert json.loads(result.stdout)["state"] == "preempted"

    def test_a_failure_instead_of_a_stop_is_an_error(
        self, empty: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        empty.begin()
        empty.beat(1, step=100)
        Meanwhile(monkeypatch, lambda: empty.beat(1, step=101, state="failed"))
        result = cloudtrain("run", "stop", empty.url, "--wait", code=1)
        assert "Error: It failed instead of stopping: attempt 1 failed at step 101" in result.stderr

    def test_ends_when_heartbeats_stop(self, empty: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        empty.begin()
        empty.beat(1, step=100)
        meanwhile = Meanwhile(monkeypatch, *[lambda: None] * 8)
        result = cloudtrain("run", "stop", empty.url, "--wait", "--json", code=1)
        assert "No heartbeat for 1 min, so it is assumed to have crashed" in result.stderr
        assert len(meanwhile.left) == 1
        assert json.loads(result.stdout)["state"] == "training"

    def test_a_new_attempt_during_the_wait_is_an_error(
        self, empty: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        empty.begin()
        empty.beat(1, step=100)
        Meanwhile(monkeypatch, empty.begin)
        result = cloudtrain("run", "stop", empty.url, "--wait", code=1)
        assert "Attempt 2 has begun since then; it was not asked to stop" in result.stderr
