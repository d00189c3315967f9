"""The benchmarks run, and their claims that need no clock are true. No test here depends on a duration."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import finding, report
from benchmarks.clients import Place
from benchmarks.measure import Checkpoint, Contestant, Scale, Workplace, percentile, side_by_side
from benchmarks.report import Row
from benchmarks.sink import Sink

QUICK = Scale(quick=True)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def other_files_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark waits until the machine has written all files, among them those of the other tests."""
    monkeypatch.setattr("os.sync", lambda: None)


def test_contestants_take_turns_and_each_round_starts_with_a_different_one() -> None:
    turns: list[str] = []
    contestants = [Contestant(name, lambda name=name: turns.append(name)) for name in "abc"]
    timings = side_by_side(contestants, rounds=3)
    assert turns == [*"abc", *"bca", *"cab"]
    assert {name: len(timing.seconds) for name, timing in timings.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_slow_contestant_has_fewer_rounds() -> None:
    timings = side_by_side([Contestant("a", list), Contestant("b", list, rounds=1)], rounds=2)
    assert (len(timings["a"].seconds), len(timings["b"].cpu)) == (2, 1)


def test_each_round_is_prepared_before_it_runs() -> None:
    done: list[str] = []
    contestant = Contestant("a", lambda: done.append("run"), prepare=lambda: done.append("prepare"))
    side_by_side([contestant], rounds=2)
    assert done == ["prepare", "run"] * 2


@pytest.mark.parametrize(
    ("count", "percent", "expected"), [(100, 99, 99), (36, 99, 36), (200, 99, 198), (3, 50, 2)]
)
def test_percentile_is_a_value_that_was_measured(count: int, percent: float, expected: int) -> None:
    assert percentile(range(count, 0, -1), percent) == expected


def test_the_verdict_uses_the_value_and_not_its_rounded_form() -> None:
    missed, reached = (
        report.at_least("upload", "", "", 0.949, 0.95),
        report.at_least("upload", "", "", 0.95, 0.95),
    )
    assert (missed.figure, missed.holds, reached.holds) == ("0.95", False, True)
    assert report.at_most("memory", "", "", 256.4, 256, " MiB").holds is False


def test_the_page_has_each_row_with_its_verdict_and_explanation(tmp_path: Path) -> None:
    rows = [
        Row("stall", "1 ms", "", "1 ms", "<= 10 ms", True),
        Row("upload", "1", "2", "0.5", ">= 0.95", False),
    ]
    page = tmp_path / "benchmarks.md"
    report.write_page({"some": rows}, {"some": "How it is measured."}, report.machine(0.5), page)
    text = page.read_text()
    assert "| stall | 1 ms |  | 1 ms | <= 10 ms | yes |" in text
    assert "| upload | 1 | 2 | 0.5 | >= 0.95 | **no** |" in text
    assert "How it is measured." in text
    assert "make bench" in text


@pytest.mark.parametrize("name", command.NAMES)
def test_each_benchmark_says_what_it_measures(name: str) -> None:
    first = command.story(name).splitlines()[0]
    assert first.endswith((".", ",", ":")), first
    assert len(first) > 40


@pytest.mark.slow  # 3 s to 2 minutes each on two busy cores, most of it in the imports of its processes
@pytest.mark.parametrize("name", command.NAMES)
def test_each_benchmark_runs(name: str) -> None:
    argv = [sys.executable, "-m", "benchmarks", name, "--quick"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.partition(f"{name}: measured in ")[2].splitlines() if " | " in line]
    assert rows, done.stdout


def test_an_unknown_benchmark_is_refused_with_the_known_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "uplaod"])
    with pytest.raises(SystemExit):
        command.main()
    assert "uplaod. Choose from stall," in capsys.readouterr().err


def test_a_checkpoint_has_the_size_that_it_reports() -> None:
    with Workplace() as work:
        checkpoint = Checkpoint(work.folder / "checkpoint", 3_000_000)
        sizes = {path.name: path.stat().st_size for path in checkpoint.folder.iterdir()}
        assert sizes == checkpoint.sizes
        assert checkpoint.size == 9_000_000 + 8 * Checkpoint.SMALL
    assert not work.folder.exists()


def test_finding_the_newest_needs_one_list_and_restoring_it_one_get_besides_the_files() -> None:
    found, restored, _ = finding.run(QUICK)
    assert found.ours == "1 ListObjectsV2"
    assert restored.holds, restored


def test_law_12_the_events_of_a_step_run_no_torch_operation() -> None:
    from benchmarks import step

    _, operations = step.run(QUICK)
    assert operations.ours == "0"


def test_law_12_a_step_of_the_loop_runs_no_torch_operation() -> None:
    from accelerate.state import AcceleratorState, GradientState

    from benchmarks import loop

    try:
        with Workplace() as work, Sink() as sink:
            _, operations = loop.step_rows(Place.of(sink), work, stretch=10)
    finally:  # they are global in a process
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    assert operations.ours == "0"


def test_law_12_a_step_of_the_functions_runs_no_torch_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import functions

    monkeypatch.setenv(
        "HF_CLOUDTRAIN_STORAGE_OPTIONS", "{}"
    )  # it sets its own, which is undone after this test
    _, operations, _ = functions.run(QUICK)
    assert operations.ours == "0"


def test_waiting_for_accelerate_on_a_different_rank_does_not_count_as_stall() -> None:
    from benchmarks.loop import _Save, _stall

    first = _Save(before=0.001, own=3.0, ended=103.0, done=103.5, beside_upload=True)
    second = _Save(before=0.002, own=0.1, ended=100.1, done=103.25, beside_upload=True)
    assert _stall([first, second]) == pytest.approx(0.502)
