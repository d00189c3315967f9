"""The save path fits in a sitting: six files in reading order, and few files that a save enters."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_cloudtrain import CheckpointUploadCallback
from hf_cloudtrain.checkpoints.catalog import Catalog
from tests.faults.runs import wait_until, write_checkpoint

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "hf_cloudtrain"
PAGE = ROOT / "docs" / "how-it-works.md"

SIX = (
    "integrations/trainer/callbacks.py",
    "checkpoints/checkpointer.py",
    "checkpoints/outbox.py",
    "checkpoints/upload_queue.py",
    "checkpoints/sender.py",
    "checkpoints/catalog.py",
)
MOST_LINES = 1_500
MOST_FILES = 12
"""Of the rooms that know what a save is. Below them a save uses `runtime` and `storage`, of which it calls functions."""
ROOMS = {"integrations", "checkpoints"}
BELOW = {"runtime", "storage"}
BESIDE_THE_PATH = {"checkpoints/exactness.py", "integrations/trainer/exactness.py"}
"""What a save says about a resume: a value that the path hands on, and where it comes from."""
OFF_THE_PATH = {
    f"checkpoints/{name}.py"
    for name in (
        *("host_shares", "host_parts", "commit_watch"),  # many hosts
        *("named_folders", "folder_upload"),
        *("in_place", "rehearsal"),
    )
}


def test_the_page_names_the_six_files_in_reading_order_with_their_lines() -> None:
    shown = re.findall(
        r"^\| \d \| \[`([\w/.]+)`\]\(\.\./hf_cloudtrain/\1\) \| (\d+) \|", PAGE.read_text(), re.MULTILINE
    )
    now = [(name, str(lines_of(name))) for name in SIX]
    table = "\n".join(
        f"| {place} | [`{name}`](../hf_cloudtrain/{name}) | {lines} | … |"
        for place, (name, lines) in enumerate(now, start=1)
    )
    assert shown == now, f"the table in {PAGE.name} should begin its rows like this:\n{table}"


def test_the_six_files_are_short() -> None:
    assert sum(map(lines_of, SIX)) <= MOST_LINES


def test_a_save_on_one_host_enters_few_files(tmp_path: Path) -> None:
    """From `on_save` of the callback to the commit, on all threads."""
    args = TrainingArguments(str(tmp_path / "out"), use_cpu=True, save_steps=5, report_to="none")
    state, control = TrainerState(max_steps=100), TrainerControl()
    callback = CheckpointUploadCallback(f"file://{tmp_path}/run")
    with Trace(until=Catalog.commit) as trace:
        callback.on_train_begin(args, state, control)
        write_checkpoint(tmp_path / "out", 5)
        state.global_step = 5
        trace.begin()
        callback.on_save(args, state, control)
        wait_until(trace.is_over.is_set, "the commit")
    callback.on_train_end(args, state, control)
    assert {room_of(name) for name in trace.entered} == ROOMS | BELOW
    entered = {name for name in trace.entered if room_of(name) in ROOMS} - BESIDE_THE_PATH
    assert set(SIX) <= entered
    assert len(entered) <= MOST_FILES, sorted(entered)
    assert not entered & OFF_THE_PATH


class Trace:
    """Names of the files of the package whose functions are called between `begin` and the return of `until`."""

    def __init__(self, until: Callable[..., object]) -> None:
        self.entered: set[str] = set()
        self.is_over = threading.Event()
        self._until = until.__code__
        self._begun = False

    def __enter__(self) -> Trace:  # noqa: PYI034 - typing.Self came with Python 3.11
        threading.setprofile(self._hear)  # for the threads that begin from now on
        sys.setprofile(self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]

    def begin(self) -> None:
        self._begun = True

    def _hear(self, frame: FrameType, event: str, argument: object) -> None:
        path = Path(frame.f_code.co_filename)
        if self._begun and not self.is_over.is_set() and path.is_relative_to(PACKAGE):
            self.entered.add(path.relative_to(PACKAGE).as_posix())
        if event == "return" and frame.f_code is self._until:
            self.is_over.set()


def lines_of(name: str) -> int:
    return len((PACKAGE / name).read_text().splitlines())


def room_of(name: str) -> str:
    return name.partition("/")[0]
