"""The attempts of a run joined to one history, in which each step counts once."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hf_cloudtrain.checkpoints.attempts import Attempt
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.tracking.history import History, history_of, lineage, read_history
from hf_cloudtrain.tracking.records import StepRecords
from tests.unit.checkpoints.manifests import manifest_of


def attempt(number: int, resumed_from: tuple[int, int] | None = None) -> Attempt:
    key = CheckpointKey(*resumed_from) if resumed_from else None
    return Attempt(number, f"nonce-{number}", resumed_from=key, global_step=key.step if key else 0)


def begin(
    catalog: Catalog, started: float, resumed_from: tuple[int, int] | None = None, at: int | None = None
) -> int:
    key = CheckpointKey(*resumed_from) if resumed_from else None
    step = at if at is not None else key.step if key else 0
    return catalog.attempts.begin(started, step, key, {"host": "a"}).number


def record(catalog: Catalog, number: int, *records: dict[str, Any], batch: int = 1) -> None:
    lines = "".join(json.dumps(item) + "\n" for item in records)
    StepRecords(catalog.storage).write(number, batch, lines.encode())


def steps(first: int, count: int, seconds: float = 1.0) -> dict[str, Any]:
    return {"kind": "steps", "first": first, "seconds": [seconds] * count}


def log(step: int, loss: float, time: float = 0.0) -> dict[str, Any]:
    return {"kind": "log", "step": step, "time": time, "loss": loss}


@pytest.mark.parametrize(
    ("attempts", "kept"),
    [
        ([], {}),
        ([attempt(1)], {1: float("inf")}),
        ([attempt(1), attempt(2, (1, 5))], {1: 5, 2: float("inf")}),
        ([attempt(1), attempt(2, (1, 5)), attempt(3, (1, 5))], {1: 5, 3: float("inf")}),
        ([attempt(1), attempt(2, (1, 5)), attempt(3, (2, 8))], {1: 5, 2: 8, 3: float("inf")}),
        ([attempt(1), attempt(2)], {2: float("inf")}),  # fresh=True
        ([attempt(2, (1, 5))], {2: float("inf")}),  # the record of attempt 1 is damaged
        ([attempt(1, (2, 5)), attempt(2, (1, 5))], {1: 5, 2: float("inf")}),  # a cycle ends
    ],
)
def test_only_attempts_that_led_to_the_newest_one_count(
    attempts: list[Attempt], kept: dict[int, float]
) -> None:
    assert {number: limit for number, (limit, _) in lineage(attempts).items()} == kept


def test_law_8_curves_continue_when_steps_become_larger_or_smaller(catalog: Catalog) -> None:
    first = begin(catalog, 100.0)
    record(catalog, first, steps(1, 6), log(2, 0.2), log(4, 0.4), log(6, 0.6))
    second = begin(catalog, 200.0, (first, 4), at=2)  # as many samples in half the steps
    record(catalog, second, steps(3, 4, 2.0), log(3, 0.3), log(6, 0.9))
    found = history_of(catalog)
    assert [(item["step"], item["loss"]) for item in found.logs] == [(1, 0.2), (2, 0.4), (3, 0.3), (6, 0.9)]
    assert [(item["step"], item["loss"]) for item in found.superseded] == [(6, 0.6)]
    assert found.step_seconds == dict.fromkeys(range(1, 7), 2.0)
    third = begin(catalog, 300.0, (second, 3), at=6)  # and back
    record(catalog, third, steps(7, 1))
    assert [item["step"] for item in history_of(catalog).logs] == [2, 4, 6]
    assert history_of(catalog).step_seconds == {2: 1.0, 4: 1.0, 1: 1.0, 3: 1.0, 6: 2.0, 7: 1.0}


def killed_and_resumed(catalog: Catalog) -> History:
    """Steps 1 to 8, killed; resumed from 5; steps 6 to 10."""
    first = begin(catalog, started=100.0)
    record(catalog, first, steps(1, 4), log(4, 0.4, 104.0))
    record(catalog, first, steps(5, 4), log(8, 0.8, 108.0), batch=2)
    catalog.attempts.write_progress(first, {"time": 108.0, "state": "training", "step": 8})
    second = begin(catalog, started=118.0, resumed_from=(first, 5))
    record(catalog, second, steps(6, 5, seconds=2.0), log(8, 0.7, 124.0), log(10, 0.5, 128.0))
    catalog.attempts.write_progress(second, {"time": 130.0, "state": "finished", "step": 10})
    return history_of(catalog)


def test_a_step_that_was_redone_is_there_once(catalog: Catalog) -> None:
    history = killed_and_resumed(catalog)
    assert [(item["step"], item["loss"], item["attempt"]) for item in history.logs] == [
        (4, 0.4, 1),
        (8, 0.7, 2),
        (10, 0.5, 2),
    ]
    assert [(item["step"], item["loss"]) for item in history.superseded] == [(8, 0.8)]
    assert history.step_seconds == dict.fromkeys(range(1, 6), 1.0) | dict.fromkeys(range(6, 11), 2.0)


def test_each_attempt_has_its_kept_and_its_redone_steps(catalog: Catalog) -> None:
    first, second = killed_and_resumed(catalog).attempts
    assert (first.first_step, first.last_step, first.kept_steps, first.redone_steps) == (0, 8, 5, 3)
    assert (first.productive_seconds, first.redone_seconds) == (5.0, 3.0)
    assert (second.first_step, second.last_step, second.kept_steps, second.redone_steps) == (5, 10, 5, 0)
    assert (first.state, second.state) == ("training", "finished")
    assert second.resumed_from == CheckpointKey(1, 5)
    assert first.facts == {"host": "a"}


def test_goodput_is_productive_time_over_wall_time_including_restarts(catalog: Catalog) -> None:
    assert killed_and_resumed(catalog).goodput == pytest.approx((5 * 1.0 + 5 * 2.0) / (130.0 - 100.0))


def test_the_cost_is_the_time_of_all_attempts_at_their_prices(catalog: Catalog) -> None:
    assert killed_and_resumed(catalog).cost is None
    for number, price in ((1, 3.6), (2, 7.2)):
        beat = catalog.attempts.read_progress(number) or {}
        catalog.attempts.write_progress(number, {**beat, "price_per_hour": price})
    found = history_of(catalog)
    first, second = (info.last_seen - info.started for info in found.attempts)
    assert found.cost == pytest.approx((3.6 * first + 7.2 * second) / 3600)
    catalog.attempts.write_progress(1, {"price_per_hour": "much"})
    found = history_of(catalog)
    assert found.cost == pytest.approx(7.2 * second / 3600)
    assert found.is_cost_bound, "the first attempt has no price"


def test_a_killed_attempt_has_cost_more_than_its_last_sign_of_life_tells(catalog: Catalog) -> None:
    begin(catalog, started=100.0)
    catalog.attempts.write_progress(
        1, {"time": 200.0, "state": "training", "step": 7, "price_per_hour": 36.0}
    )
    killed = history_of(catalog)
    assert (killed.cost, killed.is_cost_bound) == (pytest.approx(1.0), True)
    alive = history_of(catalog, now=201.0)
    assert (alive.cost, alive.is_cost_bound) == (pytest.approx(1.0), False)


def test_without_a_step_goodput_is_none(catalog: Catalog) -> None:
    assert history_of(catalog).goodput is None
    begin(catalog, started=100.0)
    assert history_of(catalog).goodput is None


def test_steps_of_the_last_seconds_before_a_kill_are_counted_by_the_heartbeat(catalog: Catalog) -> None:
    first = begin(catalog, started=100.0)
    record(catalog, first, steps(1, 5))
    catalog.attempts.write_progress(first, {"time": 110.0, "step": 9})
    begin(catalog, started=120.0, resumed_from=(first, 5))
    info = history_of(catalog).attempts[0]
    assert (info.kept_steps, info.redone_steps, info.last_step) == (5, 4, 9)


def commit(catalog: Catalog, attempt: int, step: int, created: float) -> None:
    catalog.commit(manifest_of(CheckpointKey(attempt, step), f"{attempt}-{step}", created=created))


class TestKilledBetweenTwoHeartbeats:
    """One heartbeat when it began, and SIGKILL after step 1070: what is known comes from elsewhere."""

    @pytest.fixture
    def killed(self, catalog: Catalog) -> int:
        number = begin(catalog, started=100.0)
        catalog.attempts.write_progress(number, {"time": 100.014, "step": 0, "state": "training"})
        return number

    def test_a_commit_shows_how_far_it_came_and_how_long_it_lived(
        self, catalog: Catalog, killed: int
    ) -> None:
        commit(catalog, killed, 500, created=106.0)
        commit(catalog, killed, 1000, created=112.0)
        begin(catalog, 120.0, (killed, 1000))
        history = history_of(catalog)
        info = history.attempts[0]
        assert (info.last_step, info.last_seen, info.kept_steps, info.redone_steps) == (1000, 112.0, 1000, 0)
        assert (info.was_killed, info.untimed_steps) == (True, 1000)
        assert (history.is_redone_bound, history.is_goodput_bound) == (True, True)

    def test_a_resume_shows_it_although_the_checkpoint_is_deleted(
        self, catalog: Catalog, killed: int
    ) -> None:
        begin(catalog, 120.0, (killed, 1000))
        assert history_of(catalog).attempts[0].last_step == 1000

    def test_the_records_of_its_last_save_show_it(self, catalog: Catalog, killed: int) -> None:
        record(catalog, killed, {**steps(1, 1070, 0.01), "time": 113.5})
        begin(catalog, 120.0, (killed, 1000))
        info = history_of(catalog).attempts[0]
        assert (info.last_step, info.last_seen, info.redone_steps, info.untimed_steps) == (1070, 113.5, 70, 0)

    def test_a_commit_that_a_later_attempt_recorded_shows_it(self, catalog: Catalog, killed: int) -> None:
        later = begin(catalog, 120.0, (killed, 1000))
        saved = {"kind": "commit", "checkpoint": f"{killed:06d}-0000001050", "saved": 113.0, "time": 125.0}
        record(catalog, later, saved)
        info = history_of(catalog).attempts[0]
        assert (info.last_step, info.last_seen, info.redone_steps) == (1050, 113.0, 50)

    def test_its_heartbeat_knows_the_time_of_steps_without_records(
        self, catalog: Catalog, killed: int
    ) -> None:
        record(catalog, killed, steps(1, 400, 0.01))
        progress = {"time": 115.0, "step": 1100, "state": "training", "productive_seconds": 11.0}
        catalog.attempts.write_progress(killed, progress)
        begin(catalog, 120.0, (killed, 1000))
        info = history_of(catalog).attempts[0]
        assert (info.kept_steps, info.redone_steps, info.untimed_steps) == (1000, 100, 0)
        assert (info.productive_seconds, info.redone_seconds) == (pytest.approx(10.0), pytest.approx(1.0))

    def test_an_attempt_that_recorded_its_end_is_exact(self, catalog: Catalog, killed: int) -> None:
        catalog.attempts.write_progress(killed, {"time": 115.0, "step": 1000, "state": "preempted"})
        commit(catalog, killed, 1000, created=900.0)  # its manifest is not read
        begin(catalog, 120.0, (killed, 1000))
        history = history_of(catalog)
        assert (history.attempts[0].was_killed, history.is_redone_bound) == (False, False)
        assert history.attempts[0].last_seen == 115.0

    def test_a_manifest_that_cannot_be_read_is_left_out(self, catalog: Catalog, killed: int) -> None:
        commit(catalog, killed, 1000, created=112.0)
        catalog.storage.write(f".cloudtrain/checkpoints/{CheckpointKey(killed, 1000)}.json", b"{")
        info = history_of(catalog).attempts[0]
        assert (info.last_step, info.last_seen) == (1000, 100.014)


def test_a_run_without_any_record_is_an_empty_history(catalog: Catalog) -> None:
    history = history_of(catalog)
    assert (history.attempts, history.logs, history.superseded, history.step_seconds) == ([], [], [], {})


def test_a_history_is_read_from_the_url_alone(catalog: Catalog) -> None:
    killed_and_resumed(catalog)
    assert len(read_history(catalog.storage.url).attempts) == 2


DAMAGED = [
    b"\xff\xfe",
    b"{",
    b"[]",
    b'"text"',
    b'{"kind": "steps", "first": "x", "seconds": [1]}',
    b'{"kind": "steps", "first": 3, "seconds": "x"}',
    b'{"kind": "steps", "first": 3, "seconds": ["x", null, 1e999]}',
    b'{"kind": "log", "step": "x", "loss": 1}',
    b'{"kind": "log", "step": 3, "time": "late", "loss": 1}',
    b'{"kind": "log", "step": 3, "time": null, "loss": 1}',
    b"[" * 100_000,
    b'{"kind": "steps", "first": 3, "seconds": [' + b"9" * 400 + b"]}",
]


@pytest.mark.parametrize("line", DAMAGED, ids=lambda line: ascii(line[:40]))
def test_a_damaged_line_does_not_hide_the_others(catalog: Catalog, line: bytes) -> None:
    number = begin(catalog, started=100.0)
    good = json.dumps(log(3, 0.5, 103.0)).encode()
    StepRecords(catalog.storage).write(
        number, 1, good + b"\n" + line + b"\n" + json.dumps(log(4, 0.4)).encode() + b"\n"
    )
    losses = [item["loss"] for item in history_of(catalog).logs if "loss" in item]
    assert {0.5, 0.4} <= set(losses)


@pytest.mark.parametrize(
    "data", [b"", b"[]", b'{"time": "x", "step": [], "state": 5}', b'{"step": 1' + b"0" * 400 + b"}"]
)
def test_a_damaged_heartbeat_does_not_hide_the_history(catalog: Catalog, data: bytes) -> None:
    number = begin(catalog, started=100.0)
    record(catalog, number, log(3, 0.5))
    catalog.storage.write(f".cloudtrain/progress/{number:06d}.json", data)
    history = history_of(catalog)
    assert [item["loss"] for item in history.logs] == [0.5]
    assert history.attempts[0].last_seen == 100.0


class TestWhereTheTimeWent:
    """Pauses, stalls and commits with their times, from which the timeline is drawn."""

    def test_pauses_are_read_and_an_unknown_reason_is_a_pause(self, catalog: Catalog) -> None:
        number = begin(catalog, 100.0)
        pause = {"kind": "pause", "step": 4, "time": 110.0, "seconds": 5.0}
        later = {**pause, "time": 120.0}
        record(
            catalog, number, {**later, "why": "<b>"}, {**pause, "why": "evaluation"}, {**later, "why": ["x"]}
        )
        catalog.attempts.write_progress(number, {"time": 200.0, "step": 4})
        (info,) = history_of(catalog).attempts
        assert [(item.why, item.step, item.began, item.seconds) for item in info.stretches] == [
            ("evaluation", 4, 110.0, 5.0),
            ("pause", 4, 120.0, 5.0),
            ("pause", 4, 120.0, 5.0),
        ]

    def test_a_step_far_slower_than_usual_is_a_stall_at_its_time(self, catalog: Catalog) -> None:
        number = begin(catalog, 100.0)
        record(catalog, number, steps(1, 4), log(4, 0.5, 104.0), steps(5, 1), steps(6, 1, 30.0), steps(7, 2))
        catalog.attempts.write_progress(number, {"time": 200.0, "step": 8})
        (info,) = history_of(catalog).attempts
        assert [(item.why, item.step, item.began, item.seconds) for item in info.stretches] == [
            ("stall", 6, 105.0, 30.0)
        ]

    @pytest.mark.parametrize("seconds", [0.9, 9.0])
    def test_a_step_that_is_less_slow_is_not_a_stall(self, catalog: Catalog, seconds: float) -> None:
        usual = 0.01 if seconds < 1 else 1.0
        number = begin(catalog, 100.0)
        record(catalog, number, steps(1, 9, usual), steps(10, 1, seconds))
        catalog.attempts.write_progress(number, {"time": 200.0})
        assert history_of(catalog).attempts[0].stretches == []

    def test_work_counts_until_the_step_from_which_the_next_attempt_resumed(self, catalog: Catalog) -> None:
        first, second = killed_and_resumed(catalog).attempts
        assert first.kept_until == pytest.approx(105.0)  # step 4 was logged at 104, step 5 took a second
        assert second.kept_until == pytest.approx(128.0)  # the last heartbeat came later

    def test_an_attempt_that_led_nowhere_has_no_kept_steps(self, catalog: Catalog) -> None:
        first = begin(catalog, 100.0)
        record(catalog, first, steps(1, 4))
        catalog.attempts.write_progress(first, {"time": 104.0, "step": 4})
        begin(catalog, 200.0)  # fresh=True
        info = history_of(catalog).attempts[0]
        assert (info.kept_steps, info.kept_until) == (0, 100.0)

    def test_commits_are_known_by_checkpoint_including_deleted_ones(self, catalog: Catalog) -> None:
        number = begin(catalog, 100.0)
        commit = {"kind": "commit", "checkpoint": "000001-0000000005", "saved": 110.0, "time": 114.0}
        again = {**commit, "time": 120.0, "size": 7}
        record(
            catalog,
            number,
            commit,
            again,
            {**commit, "checkpoint": "000001-0000000009", "time": 112.5, "size": 9},
        )
        found = history_of(catalog).commits
        assert {key: (item.lag, item.size) for key, item in found.items()} == {
            CheckpointKey(1, 5): (4.0, None),
            CheckpointKey(1, 9): (2.5, 9),
        }

    def test_the_attempt_of_each_step_and_the_times_of_redone_steps_are_known(self, catalog: Catalog) -> None:
        history = killed_and_resumed(catalog)
        assert history.step_attempts == dict.fromkeys(range(1, 6), 1) | dict.fromkeys(range(6, 11), 2)
        assert history.redone_step_seconds == [(1, 6, 1.0), (1, 7, 1.0), (1, 8, 1.0)]

    @pytest.mark.parametrize(
        "line",
        [
            b'{"kind": "pause"}',
            b'{"kind": "pause", "step": -1, "time": 110, "seconds": 5}',
            b'{"kind": "pause", "step": 4, "time": NaN, "seconds": 5}',
            b'{"kind": "pause", "step": 4, "time": 110, "seconds": -5}',
            b'{"kind": "commit"}',
            b'{"kind": "commit", "checkpoint": "../x", "saved": 1, "time": 2}',
            b'{"kind": "commit", "checkpoint": "000001-0000000005", "saved": null, "time": 2}',
            b'{"kind": "log", "step": 1' + b"0" * 400 + b', "loss": 1}',
            b'{"kind": "steps", "first": 1' + b"0" * 400 + b', "seconds": [1]}',
            b'{"kind": "steps", "first": true, "seconds": [1]}',
        ],
    )
    def test_a_damaged_record_is_ignored(self, catalog: Catalog, line: bytes) -> None:
        number = begin(catalog, 100.0)
        StepRecords(catalog.storage).write(number, 1, line)
        history = history_of(catalog)
        assert (history.commits, history.logs, history.step_seconds) == ({}, [], {})
        assert history.attempts[0].stretches == []
