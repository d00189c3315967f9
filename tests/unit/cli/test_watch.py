"""`cloudtrain run watch`: it shows each change, survives storage errors, and ends with the run."""

from __future__ import annotations

import io
import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.checkpoints.titles import Titles
from hf_cloudtrain.cli import app
from hf_cloudtrain.cli import watch as cli_watch
from hf_cloudtrain.cli.watch import picture
from hf_cloudtrain.jobs.records import JobStore
from hf_cloudtrain.tracking import watcher
from hf_cloudtrain.tracking.watcher import View, Watcher
from tests.faults.runs import Machines
from tests.recorded import commit, write

Change = Callable[[], None]


def beat(catalog: Catalog, attempt: int = 1, **progress: Any) -> None:
    now = time.time()
    told = {
        "state": "training",
        "time": now,
        "last_step_time": now,
        "step": 10,
        "total_steps": 100,
        **progress,
    }
    catalog.attempts.write_progress(attempt, told)


@pytest.fixture
def run(catalog: Catalog) -> Catalog:
    """At step 10 of 100, with losses of its first steps."""
    catalog.attempts.begin(time.time(), 0, None, {"host": "gpu-07"})
    write(
        catalog,
        1,
        [{"kind": "log", "step": step, "time": 1.0, "loss": 3.0 - step / 10} for step in (2, 4, 6)],
    )
    beat(catalog, loss=2.0)
    return catalog


@pytest.fixture
def changes(monkeypatch: pytest.MonkeyPatch) -> list[Change]:
    """What happens between two looks, one thing at a time; a watcher that waits for more fails."""
    made: list[Change] = []
    left: list[Iterator[Change]] = []

    def wait() -> None:
        if not left:
            left.append(iter(made))
        next(left[0], stop)()

    def stop() -> None:
        raise AssertionError("still watching a run that is over")

    monkeypatch.setattr(watcher, "wait", wait)
    return made


def watch(catalog: Catalog, *words: str, code: int = 0) -> list[str]:
    result = CliRunner().invoke(app, ["run", "watch", catalog.storage.url, *words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return str(result.stdout).splitlines()


def drawn(run: Catalog, view: View, *, width: int = 120, ascii_only: bool = False) -> str:
    page = io.StringIO()
    shown = picture(view, Titles(run), width, ascii_only=ascii_only)
    Console(file=page, width=width, color_system=None).print(shown)
    return page.getvalue()


def looked(catalog: Catalog) -> View:
    return next(Watcher(catalog).views())


def test_each_change_is_a_line_and_the_end_of_the_run_is_the_end(run: Catalog, changes: list[Change]) -> None:
    changes += [
        lambda: None,
        lambda: beat(run, time=time.time() + 1),  # a heartbeat without a change
        lambda: beat(run, step=20, loss=1.5, eta_seconds=90.0),
        lambda: commit(run, CheckpointKey(1, 20), 0.0),
        lambda: beat(run, step=100, loss=1.0, state="finished"),
    ]
    lines = [line[21:] for line in watch(run)]
    assert lines == [
        "attempt 1 training, step 10/100 (10%), loss 2, last committed none yet",
        "attempt 1 training, step 20/100 (20%), loss 1.5, eta 1 min 30 s, last committed none yet",
        "attempt 1 training, step 20/100 (20%), loss 1.5, eta 1 min 30 s, last committed checkpoint-20",
        "attempt 1 finished, step 100/100 (100%), loss 1, last committed checkpoint-20",
    ]


def test_each_change_is_an_object_for_programs(run: Catalog, changes: list[Change]) -> None:
    changes += [lambda: beat(run, step=20), lambda: beat(run, step=20, state="stopped")]
    records = [json.loads(line) for line in watch(run, "--json")]
    assert [(item["state"], item["step"]) for item in records] == [
        ("training", 10),
        ("training", 20),
        ("stopped", 20),
    ]


def test_every_key_of_the_objects_is_in_the_documentation(run: Catalog) -> None:
    beat(run, state="finished")
    (line,) = watch(run, "--json")
    page = Path(__file__).resolve().parents[3] / "docs" / "cli.md"
    section = page.read_text().split("## cloudtrain run watch\n")[1].split("\n## ")[0]
    assert {key for key in json.loads(line) if f"`{key}`" not in section} == set()


def test_a_new_attempt_is_followed(run: Catalog, changes: list[Change]) -> None:
    def restarted() -> None:
        run.attempts.begin(time.time(), 4, CheckpointKey(1, 4), {})
        beat(run, 2, step=5)

    changes += [lambda: beat(run, time=time.time() - 100), restarted, lambda: beat(run, 2, state="finished")]
    found = [json.loads(line) for line in watch(run, "--json")]
    assert [(item["attempt"], item["state"]) for item in found] == [
        (1, "training"),
        (1, "killed"),
        (2, "training"),
        (2, "finished"),
    ]


@pytest.mark.parametrize("state", ["failed", "overtaken"])
def test_a_failed_or_overtaken_run_is_exit_code_1(run: Catalog, state: str) -> None:
    beat(run, state=state)
    assert len(watch(run, code=1)) == 1


def test_a_run_without_heartbeats_is_shown_as_stalled_and_watched_on(
    run: Catalog, changes: list[Change]
) -> None:
    changes += [lambda: beat(run, time=time.time() - 100), lambda: beat(run, state="finished")]
    lines = watch(run)
    assert "stalled, no heartbeat" in lines[1]
    assert len(lines) == 3


def test_a_storage_error_is_shown_and_the_watching_goes_on(
    machines: Machines, changes: list[Change], caplog: pytest.LogCaptureFixture
) -> None:
    run = Catalog(machines.storage)
    machines.catalog.attempts.begin(time.time(), 0, None, {})
    beat(machines.catalog)
    changes += [
        lambda: machines.storage.fail("list", times=1000),
        lambda: None,
        machines.storage.heal,
        lambda: beat(machines.catalog, step=20, state="finished"),
    ]
    lines = watch(run)
    assert "cannot read the run: Could not list" in lines[1]
    assert ["cannot read the run" in line for line in lines] == [False, True, False, False]
    assert "step 10/100" in lines[1]


def test_a_damaged_heartbeat_does_not_warn_at_every_look(
    run: Catalog, changes: list[Change], caplog: pytest.LogCaptureFixture
) -> None:
    def damage() -> None:
        run.storage.write(".cloudtrain/progress/000001.json", b"{")

    caplog.set_level(logging.INFO, "hf_cloudtrain")
    changes += [damage, lambda: None, lambda: None, lambda: beat(run, state="finished")]
    watch(run)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert logging.getLogger("hf_cloudtrain").level == logging.INFO


def test_a_run_that_does_not_exist_is_an_error(catalog: Catalog) -> None:
    result = CliRunner().invoke(app, ["run", "watch", catalog.storage.url])
    assert result.exit_code == 1
    assert f"run at {catalog.storage.url!r}" in result.stderr


def test_it_waits_for_a_job_before_the_first_attempt_and_between_two(
    catalog: Catalog, changes: list[Change], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_CLOUDTRAIN_STORE", str(tmp_path / "store"))
    store = JobStore()
    facts = {"engine": "local", "nodes": 1, "nproc_per_node": 1, "max_restarts": 3}
    record = store.create("toy", run_url=f"{catalog.storage.url}/", **facts)
    store.write(record, state="starting", handle={"host": "another"})

    def begin() -> None:
        catalog.attempts.begin(time.time(), 0, None, {})

    changes += [
        begin,
        lambda: beat(catalog, state="failed"),
        begin,
        lambda: beat(catalog, 2, state="stopped"),
        lambda: store.write(record, state="cancelled"),
        lambda: None,
    ]
    lines = watch(catalog)
    states = ("started", "failed", "started", "stopped")
    assert all(state in line for state, line in zip(states, lines, strict=True)), lines


def test_ctrl_c_ends_the_watching_and_leaves_the_run_alone(
    run: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watcher, "wait", interrupt)
    before = sorted(info.path for info in run.storage.list(""))
    assert len(watch(run, code=130)) == 1
    assert sorted(info.path for info in run.storage.list("")) == before
    assert not run.attempts.stop_requested(1)


class TestPicture:
    """What a terminal shows."""

    def test_it_shows_progress_uploads_losses_and_attempts(self, run: Catalog) -> None:
        beat(
            run,
            loss=2.0,
            step_seconds=2.0,
            samples_per_second=16.0,
            eta_seconds=180.0,
            last_saved="000001-0000000010",
            last_saved_time=time.time() - 75,
            commit_lag_seconds=14.2,
        )
        commit(run, CheckpointKey(1, 5), 0.0)
        text = drawn(run, looked(run))
        for part in (
            *(
                "training",
                "attempt 1, heartbeat",
                "10/100 (10%)",
                "2 s per step, 16 samples/s",
                "3 min",
                "━━",
            ),
            *("checkpoint-5, 14.2 s after its save", "checkpoint-10, for 1 min 1"),
            *("loss 2.8 at step 2 to 2.4 at step 6", "gpu-07", "0 to 10"),
        ):
            assert part in text, part

    @pytest.mark.parametrize("width", [40, 80, 110])
    def test_it_fits_the_terminal_and_the_curve_uses_all_of_it(self, run: Catalog, width: int) -> None:
        beat(run, loss=2.0, step_seconds=2.0)
        view = looked(run)
        view.losses[:] = [(step, 3.0 - step / 300) for step in range(1, 500)]
        lines = drawn(run, view, width=width).splitlines()
        assert all(len(line) <= width for line in lines)
        assert max(len(line) for line in lines if "\u2800" <= line[:1] <= "\u28ff") == width

    def test_a_run_without_steps_losses_or_heartbeat_is_shown_too(self, catalog: Catalog) -> None:
        catalog.attempts.begin(time.time(), 0, None, {})
        text = drawn(catalog, looked(catalog))
        assert "started  attempt 1" in text
        assert "none yet" in text

    def test_a_stall_and_a_storage_error_are_shown(self, run: Catalog) -> None:
        beat(run, last_step_time=time.time() - 500)
        view = looked(run)
        assert "Stalled, no step for 500 s" in drawn(run, view)
        view.trouble = "no answer"
        assert "Cannot read the run: no answer" in drawn(run, view)

    def test_texts_from_storage_move_no_cursor(self, catalog: Catalog) -> None:
        catalog.attempts.begin(time.time(), 0, None, {"host": "\x1b[2Jgone[bold]"})
        beat(catalog, state="\x1b[31mred")
        text = drawn(catalog, looked(catalog))
        assert "\x1b" not in text
        assert "\\x1b[2Jgone[bold]" in text

    def test_one_number_says_how_far_it_is_and_never_goes_back(
        self, run: Catalog, changes: list[Change]
    ) -> None:
        write(run, 1, [{"kind": "steps", "first": 1, "seconds": [0.1] * 30, "time": time.time()}])
        changes += [lambda: beat(run, step=25), lambda: beat(run, step=31)]
        views = Watcher(run).views()
        seen = [(view.state.step, drawn(run, view)) for view in (next(views) for _ in range(3))]
        assert [step for step, _ in seen] == [30, 30, 31]
        assert all(f"{step}/100" in text and f"0 to {step}" in text for step, text in seen)

    def test_a_loss_of_nan_is_shown_as_not_finite(self, run: Catalog) -> None:
        beat(run, step=20, loss="nan", loss_step=20)
        assert "not finite (nan)" in drawn(run, looked(run))
        beat(run, step=20, loss=0.25, loss_step=18)
        assert "0.25 (step 18)" in drawn(run, looked(run))

    def test_the_next_look_follows_any_error_of_a_client(
        self, run: Catalog, changes: list[Change], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def breaks(catalog: Catalog) -> None:
            raise KeyError("of a client")

        changes += [lambda: monkeypatch.setattr(watcher, "run_state", breaks), monkeypatch.undo]
        views = Watcher(run).views()
        next(views)
        assert next(views).trouble == "KeyError: 'of a client'"

    def test_losses_are_kept_from_look_to_look(self, run: Catalog, changes: list[Change]) -> None:
        changes += [
            lambda: beat(run, step=20, loss=1.5, loss_step=20),
            lambda: beat(run, step=20, loss=1.4, loss_step=20),
        ]
        views = Watcher(run).views()
        seen = [next(views).losses for _ in range(3)]
        assert seen[0] == [(2, 2.8), (4, 2.6), (6, 2.4)]
        assert seen[1] == seen[2] == [*seen[0], (20, 1.5)]

    def test_a_terminal_gets_a_picture_and_the_last_one_stays(
        self, run: Catalog, changes: list[Change], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        changes += [lambda: beat(run, step=20), lambda: beat(run, step=100, state="finished")]
        page = io.StringIO()
        console = Console(file=page, force_terminal=True, width=100, color_system=None)
        monkeypatch.setattr("rich.console.Console", lambda **_: console)
        assert cli_watch.watch(run, as_json=False).state == "finished"
        assert "20/100 (20%)" in page.getvalue()
        assert "100/100 (100%)" in page.getvalue().rpartition("\x1b[2K")[2]

    def test_what_it_waits_for_stands_above_the_picture(
        self, run: Catalog, changes: list[Change], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        changes += [lambda: beat(run, state="failed"), lambda: beat(run, state="finished")]
        page = io.StringIO()
        console = Console(file=page, force_terminal=True, width=100, color_system=None)
        monkeypatch.setattr("rich.console.Console", lambda **_: console)
        cli_watch.watch(run, as_json=False, awaited=lambda: "Job toy-1 is starting")
        said = "Job toy-1 is starting; waiting for training to begin. Ctrl-C leaves it alone."
        shown = next(line for line in page.getvalue().splitlines() if said in line)
        assert shown.rpartition("\x1b[2K")[2] == said
