"""The status of a run from its newest heartbeat: waiting, training, slow, stalled, killed or over."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.tracking.status import SLOW, run_state
from tests.faults.runs import Machines
from tests.recorded import commit


def begin(catalog: Catalog, **progress: Any) -> None:
    """An attempt with a heartbeat of just now."""
    now = time.time()
    number = catalog.attempts.begin(now - 600, 0, None, {}).number
    if progress:
        beat = {"state": "training", "time": now, "last_step_time": now, "step": 42, "total_steps": 100}
        catalog.attempts.write_progress(number, {**beat, **progress})


def test_a_run_without_an_attempt_is_waiting(catalog: Catalog) -> None:
    now = run_state(catalog)
    assert (now.state, now.attempt, now.attempts, now.step, now.is_over) == ("waiting", None, 0, None, False)


def test_an_attempt_without_a_heartbeat_has_started(catalog: Catalog) -> None:
    catalog.attempts.begin(time.time(), 0, None, {})
    now = run_state(catalog)
    assert (now.state, now.attempt, now.step, now.stalled, now.is_over) == ("started", 1, None, None, False)
    assert now.heartbeat_age_seconds == pytest.approx(0, abs=30)


def test_a_training_run_has_step_rate_loss_and_eta(catalog: Catalog) -> None:
    begin(catalog, step_seconds=2.0, samples_per_second=16.0, loss=0.5, eta_seconds=116.0)
    now = run_state(catalog)
    assert (now.state, now.step, now.total_steps, now.stalled) == ("training", 42, 100, None)
    assert (now.step_seconds, now.samples_per_second, now.loss, now.eta_seconds) == (2.0, 16.0, 0.5, 116.0)


@pytest.mark.parametrize(
    ("progress", "committed", "step"),
    [
        ({}, [], None),
        ({"step": 0}, [(1, 1000)], 1000),
        ({"step": 1070}, [(1, 1000)], 1070),
        ({"step": 1000, "last_saved": "000001-0000001050"}, [(1, 1000)], 1050),
        ({"step": 5, "last_saved": "000007-0000001050"}, [(7, 1000)], 5),
    ],
)
def test_the_step_is_the_highest_that_a_heartbeat_or_a_checkpoint_shows(
    catalog: Catalog, progress: dict[str, Any], committed: list[tuple[int, int]], step: int | None
) -> None:
    begin(catalog, **progress)
    for key in committed:
        commit(catalog, CheckpointKey(*key), 1.0)
    assert run_state(catalog).step == step


@pytest.mark.parametrize(
    ("told", "loss"), [("nan", "nan"), ("inf", "inf"), (0.5, "0.5"), ("abc", "None"), (None, "None")]
)
def test_a_loss_that_is_not_finite_is_the_loss(catalog: Catalog, told: Any, loss: str) -> None:
    begin(catalog, step=5, loss=told, loss_step=4)
    state = run_state(catalog)
    assert (str(state.loss), state.loss_step) == (loss, 4)


@pytest.mark.parametrize("state", ["finished", "failed", "stopped", "overtaken"])
def test_a_run_with_a_recorded_end_is_over_and_has_no_eta(catalog: Catalog, state: str) -> None:
    begin(catalog, state=state, eta_seconds=116.0, time=time.time() - 4000, last_saved="000001-0000000040")
    now = run_state(catalog)
    assert (now.state, now.is_over, now.eta_seconds, now.stalled, now.uploading) == (
        state,
        True,
        None,
        None,
        None,
    )


def test_a_run_without_heartbeats_is_stalled_and_not_over(catalog: Catalog) -> None:
    begin(catalog, time=time.time() - 61)
    now = run_state(catalog)
    assert (now.state, now.is_over) == ("killed", False)
    assert now.stalled is not None
    assert "no heartbeat" in now.stalled


def test_a_run_with_heartbeats_and_without_steps_is_stalled(catalog: Catalog) -> None:
    """A process that hangs in a collective still sends heartbeats."""
    begin(catalog, last_step_time=time.time() - 70, step_seconds=0.5)
    now = run_state(catalog)
    assert now.state == "training"
    assert now.stalled == "no step for 70 s: it hangs or evaluates"


def test_slow_steps_are_not_a_stall(catalog: Catalog) -> None:
    begin(catalog, last_step_time=time.time() - 70, step_seconds=70 / SLOW + 1)
    assert run_state(catalog).stalled is None


def test_a_stall_is_measured_by_the_clock_of_the_training_machine(catalog: Catalog) -> None:
    ahead = time.time() + 5000
    begin(catalog, time=ahead, last_step_time=ahead - 10)
    now = run_state(catalog)
    assert (now.state, now.stalled, now.heartbeat_age_seconds) == ("training", None, 0.0)
    begin(catalog, time=ahead, last_step_time=ahead - 100)
    assert run_state(catalog).stalled == "no step for 100 s: it hangs or evaluates"


def test_a_checkpoint_that_is_saved_and_not_committed_is_uploading(catalog: Catalog) -> None:
    saved = {"last_saved": "000001-0000000040", "last_saved_time": time.time() - 20}
    begin(catalog, **saved, commit_lag_seconds=3.5)
    now = run_state(catalog)
    assert (now.uploading, now.last_committed, now.checkpoints) == ("000001-0000000040", None, 0)
    assert now.uploading_seconds == pytest.approx(20, abs=10)
    commit(catalog, CheckpointKey(1, 40), 0.0)
    now = run_state(catalog)
    assert (now.uploading, now.uploading_seconds) == (None, None)
    assert (now.last_committed, now.checkpoints, now.commit_lag_seconds) == ("000001-0000000040", 1, 3.5)


def test_it_reads_two_listings_and_one_record_however_long_the_run(machines: Machines) -> None:
    for step in (1, 2, 3):
        begin(machines.catalog, step=step)
        commit(machines.catalog, CheckpointKey(step, step), 0.0)
    machines.storage.calls.clear()
    assert run_state(Catalog(machines.storage)).step == 3
    assert sorted(call.kind for call in machines.storage.calls) == ["list", "list", "read"]


@pytest.mark.parametrize("value", ["x", None, True, 1e300, float("nan"), [], {"a": 1}, -(10**400)])
def test_a_value_that_is_not_a_number_is_unknown(catalog: Catalog, value: Any) -> None:
    names = ("step", "total_steps", "loss", "last_step_time", "step_seconds", "eta_seconds", "last_saved")
    catalog.attempts.begin(time.time(), 0, None, {})
    beat = {"state": "training", "time": time.time(), **dict.fromkeys(names, value)}
    catalog.storage.write(".cloudtrain/progress/000001.json", json.dumps(beat).encode())
    now = run_state(catalog)
    assert (now.step, now.total_steps, now.loss, now.eta_seconds, now.uploading) == (None,) * 5
    assert now.stalled is None
