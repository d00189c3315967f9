"""Tables and facts in 80 columns: no word is broken, and no name is cut."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from typing import Any

import pytest

from hf_cloudtrain.cli import tables
from hf_cloudtrain.cli.tables import Columns
from hf_cloudtrain.datasets.store import DatasetStore
from hf_cloudtrain.jobs.inventory import Found, Vm
from hf_cloudtrain.jobs.records import JobStore, Start
from tests.unit.cli.terminal import ENTRY_POINT, Run, cloudtrain

NAME = "bert-large-uncased-whole-word-masking-on-all-of-glue-long-12"
REASON = "Node 0 ended with exit code 1: RuntimeError in the 12th step, after a checkpoint was committed."


def columns_of(*names: str) -> Columns:
    return {name: lambda record, name=name: record[name.lstrip(">")] for name in names}  # type: ignore[misc]


def words_of(text: str) -> list[str]:
    return re.sub(r"\x1b\[[0-9;]*m", "", text).split()


class TestTable:
    RECORDS = ({"run": "mrpc", "step": 1200, "seen": "2026-11-29 11:09:29", "notes": "newest, best"},)
    COLUMNS = columns_of("run", ">step", "seen", "notes")

    def test_without_a_terminal_is_as_wide_as_its_content(self) -> None:
        layout = tables.table(self.COLUMNS, [{**self.RECORDS[0], "run": "x" * 300}], None, ["seen"])
        assert layout.rows == [f"{'x' * 300}  1200  2026-11-29 11:09:29  newest, best"]
        assert layout.left_out == []

    def test_leaves_out_only_as_many_columns_as_it_must_in_their_order(self) -> None:
        def left_out(width: int) -> list[str]:
            return tables.table(self.COLUMNS, self.RECORDS, width, ["seen", "step"]).left_out

        assert [left_out(width) for width in (45, 44, 24, 23)] == [[], ["seen"], ["seen"], ["seen", "step"]]

    def test_leaves_out_columns_without_a_value_first_and_does_not_name_them(self) -> None:
        layout = tables.table(self.COLUMNS, [{**self.RECORDS[0], "notes": None}], 31, ["seen", "step"])
        assert layout.heading.split() == ["run", "step", "seen"]
        assert layout.left_out == []

    def test_a_long_name_stands_on_a_line_of_its_own_and_the_others_keep_theirs(self) -> None:
        records = [{**self.RECORDS[0], "run": name} for name in ("mrpc", NAME)]
        layout = tables.table(self.COLUMNS, records, 80)
        assert layout.rows[0].split()[:2] == ["mrpc", "1200"]
        assert layout.rows[1] == NAME
        assert layout.rows[2].split()[0] == "1200"
        assert layout.rows[0].index("1200") == layout.rows[2].index("1200")
        assert all(len(row) <= 80 for row in layout.rows)

    def test_prose_is_wrapped_between_words_below_itself(self) -> None:
        layout = tables.table(columns_of("run", "notes"), [{"run": "a", "notes": REASON}], 40, prose="notes")
        assert {row[:5] for row in layout.rows[1:]} == {" " * 5}
        assert words_of(" ".join(layout.rows)) == ["a", *REASON.split()]
        assert all(len(row) <= 40 for row in layout.rows)

    def test_a_word_that_is_longer_than_the_terminal_stays_whole(self) -> None:
        layout = tables.table(
            columns_of("run", "notes"), [{"run": "a", "notes": "x" * 90}], 40, prose="notes"
        )
        assert layout.rows == [f"a    {'x' * 90}"]

    def test_wide_characters_count_twice(self) -> None:
        layout = tables.table(
            columns_of("run", "step"), [{"run": "模型", "step": 1}, {"run": "ab", "step": 2}], 80
        )
        assert layout.rows == ["模型  1", "ab    2"]


def test_facts_are_wrapped_between_words_below_their_value() -> None:
    lines = tables.facts({"state": "failed", "reason": REASON, "eta": None}, 40)
    assert [name for name, _ in lines] == ["state ", "reason", *["      "] * (len(lines) - 2)]
    assert words_of("".join(rest for _, rest in lines)) == ["failed", *REASON.split()]
    assert all(len(name + rest) <= 40 for name, rest in lines)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    """A store in which every name is long."""
    folder = run.folder.parent.parent
    monkeypatch.setenv("HF_CLOUDTRAIN_STORE", str(folder))
    monkeypatch.setenv("COLUMNS", "80")
    shutil.copytree(run.folder, run.folder.parent / NAME)
    jobs = JobStore()
    facts: dict[str, Any] = {"engine": "skypilot", "nodes": 16, "nproc_per_node": 8, "max_restarts": 3}
    record = jobs.create(NAME[:-3], run_url=None, **facts)
    start = Start(1, time.time() - 9000, time.time(), "failed", REASON, (1, 75, None, None))
    jobs.write(record, state="failed", reason=REASON, starts=(start, start))
    (folder / "data").mkdir()
    (folder / "data" / "train.csv").write_text("1")
    DatasetStore().create(NAME, str(folder / "data"))
    vms = [
        Vm(
            "skypilot",
            "azure",
            "germanywestcentral",
            "rtx-pro-6000-server",
            8,
            96,
            quota="1 of 20 nodes idle",
        ),
        Vm("local", "local", NAME, cpus=128),
    ]
    monkeypatch.setattr("hf_cloudtrain.jobs.inventory.find", lambda *_: Found(vms))


COMMANDS = [
    (("run", "list"), NAME),
    (("run", "status", "mrpc"), "checkpoint-400"),
    (("checkpoint", "list", "mrpc"), "checkpoint-300.a2"),
    (("checkpoint", "view", "mrpc"), "checkpoint-400"),
    (("checkpoint", "verify", "mrpc", "--all"), "checkpoint-300.a2"),
    (("checkpoint", "prune", "mrpc", "--keep-last", "1", "--dry-run"), "checkpoint-300.a2"),
    (("run", "clean", "mrpc", "--dry-run"), ""),
    (("job", "list"), f"{NAME[:-3]}-1"),
    (("job", "status", NAME[:-3]), f"{NAME[:-3]}-1"),
    (("data", "list"), NAME),
    (("data", "view", NAME), NAME),
    (("vm", "list"), "azure-96gb-rtx-pro-6000-server-8g-germanywestcentral"),
]


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize(
    ("words", "name"), COMMANDS, ids=lambda value: " ".join(value) if isinstance(value, tuple) else ""
)
def test_a_command_fits_80_columns_with_long_names(
    monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], name: str
) -> None:
    everything = words_of(cloudtrain(*words).stdout)
    monkeypatch.setattr(tables, "terminal_width", lambda: 80)
    shown = cloudtrain(*words).stdout
    long = [line for line in shown.splitlines() if len(line) > 80 and len(line.strip("│ ").split()) > 1]
    assert long == [], "a line with several words is wrapped by the terminal in the middle of one"
    assert name in words_of(shown) or not name
    assert set(words_of(shown)) <= set(everything), "a word is broken"


def test_a_message_ends_its_lines_between_words_and_keeps_commands_whole() -> None:
    url = "s3://bucket/" + "x" * 30
    text = f"There is no run at '{url}'. `cloudtrain run list` shows those that exist.\nSecond line."
    assert tables.message(text, 40).split("\n") == [
        "There is no run at",
        f"'{url}'.",
        "`cloudtrain run list` shows those that",
        "exist.",
        "Second line.",
    ]


def test_an_error_fits_a_terminal_of_80_columns() -> None:
    ours, its = os.openpty()
    words = [str(ENTRY_POINT), "run", "status", "s3:/bucket/runs/mrpc"]
    with os.fdopen(its, "wb"), os.fdopen(ours, "rb", buffering=0) as terminal:
        subprocess.run(
            words, env={**os.environ, "COLUMNS": "80"}, stdout=its, stderr=its, check=False, timeout=60
        )
        lines = terminal.read(10_000).decode().split("\r\n")
    assert lines[0].startswith("Error: 's3:/bucket/runs/mrpc' cannot be used as a URL: ")
    assert len(lines) > 2
    assert max(map(len, lines)) <= 80
