"""Handlers only take a note, act in one process, and give the signals back."""

from __future__ import annotations

import os
import pty
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from hf_cloudtrain.preemption.signals import STOPPING, SignalWatch

FOREVER = 1e9


@pytest.fixture
def seen() -> Iterator[list[int]]:
    """Signals that the watch received; the previous handlers are restored afterwards."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    yield []
    for number, handler in before.items():
        signal.signal(number, handler)


def watch_of(seen: list[int], patience: float = FOREVER, **arguments: Any) -> SignalWatch:
    watch = SignalWatch(seen.append, patience=lambda: patience, **arguments)
    watch.start()
    return watch


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", STOPPING)
def test_the_first_signal_is_noted_and_does_not_end_the_process(seen: list[int], number: int) -> None:
    watch_of(seen)
    send(number)
    assert seen == [number]


def test_further_signals_are_ignored(seen: list[int]) -> None:
    watch_of(seen)
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        send(number)
    assert seen == [signal.SIGTERM]


def test_a_second_ctrl_c_quits(seen: list[int]) -> None:
    watch_of(seen)
    send(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)
    assert seen == [signal.SIGINT]


def test_after_the_grace_time_a_signal_goes_to_the_previous_handler(seen: list[int]) -> None:
    before: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: before.append(number))
    watch_of(seen, patience=-1.0)
    send(signal.SIGTERM)
    assert (seen, before) == ([signal.SIGTERM], [])
    send(signal.SIGTERM)
    assert (seen, before) == ([signal.SIGTERM], [signal.SIGTERM])


def test_close_restores_the_previous_handlers(seen: list[int]) -> None:
    before = [signal.getsignal(number) for number in STOPPING]
    watch = watch_of(seen)
    assert signal.getsignal(signal.SIGTERM) != before[0]
    watch.close()
    assert [signal.getsignal(number) for number in STOPPING] == before


def test_close_keeps_a_handler_that_was_installed_since(seen: list[int]) -> None:
    def mine(number: int, frame: FrameType | None) -> None: ...

    watch = watch_of(seen)
    signal.signal(signal.SIGUSR1, mine)
    watch.close()
    assert signal.getsignal(signal.SIGUSR1) is mine


def test_an_ignored_signal_stays_ignored(seen: list[int]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell starts what runs in the background
    watch_of(seen)
    send(signal.SIGINT)
    assert seen == []


def test_call_previous_passes_signals_on_but_not_to_pythons_own_handler(seen: list[int]) -> None:
    before: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, frame: before.append(number))
    watch = watch_of(seen)
    for number in (signal.SIGINT, signal.SIGUSR1):
        send(number)
    assert before == []
    watch.call_previous()
    assert before == [signal.SIGUSR1]


def test_a_forked_child_has_the_previous_handlers(seen: list[int]) -> None:
    watch_of(seen)
    child = os.fork()
    if child == 0:
        send(signal.SIGTERM)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGTERM
    assert seen == []
    send(signal.SIGTERM)
    assert seen == [signal.SIGTERM]


def test_a_loader_worker_leaves_the_process_group_that_a_launcher_signals(seen: list[int]) -> None:
    torch = pytest.importorskip("torch")
    loader = torch.utils.data.DataLoader([0], num_workers=1, collate_fn=lambda rows: os.getpgrp())
    (group,) = loader
    assert group != os.getpgrp()
    assert group > 0


def test_outside_of_the_training_signals_go_to_the_previous_handlers(seen: list[int]) -> None:
    before: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: before.append(number))

    def train() -> None:
        send(signal.SIGTERM)

    watch_of(seen, within=train.__code__)
    send(signal.SIGTERM)
    assert (seen, before) == ([], [signal.SIGTERM])
    train()
    assert (seen, before) == ([signal.SIGTERM], [signal.SIGTERM])


def test_on_another_thread_no_handler_is_installed_and_a_warning_says_so(
    seen: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=watch_of, args=(seen,))
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before
    assert "SIGTERM causes no emergency save" in caplog.text


TABLE = [
    ("SIGTERM", "noted"),
    ("SIGUSR1", "noted"),
    ("SIGUSR2", "noted"),
    ("SIGHUP", "noted"),
    ("SIGINT", "noted"),
    ("SIGQUIT", "unchanged"),
    ("SIGALRM", "unchanged"),
    ("SIGCHLD", "unchanged"),
    ("SIGPIPE", "unchanged"),
]


@pytest.mark.parametrize(("name", "effect"), TABLE)
def test_the_table_of_signals(seen: list[int], name: str, effect: str) -> None:
    number = getattr(signal, name)
    before = signal.getsignal(number)
    watch = watch_of(seen)
    assert (signal.getsignal(number) != before) == (effect == "noted")
    if effect == "noted":
        send(number)
        assert seen == [number]
    watch.close()
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("name", [name for name, effect in TABLE if effect == "noted"])
def test_each_signal_that_is_ignored_stays_ignored(seen: list[int], name: str) -> None:
    signal.signal(getattr(signal, name), signal.SIG_IGN)
    watch_of(seen)
    send(getattr(signal, name))
    assert seen == []


def test_the_table_of_signals_is_in_the_documentation() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "preemption.md").read_text()
    rows = "\n".join(line for line in page.splitlines() if line.startswith("| SIG"))
    for number in STOPPING:
        assert signal.Signals(number).name in rows


TERMINAL = """
import os, signal, sys
from hf_cloudtrain.preemption.signals import SignalWatch

seen = []
SignalWatch(seen.append, patience=lambda: 30.0).start()
print("ready", flush=True)
while not seen:
    signal.pause()
print("progress", flush=True)
print("error", file=sys.stderr, flush=True)
open(sys.argv[1], "w").write(signal.Signals(seen[0]).name)
"""


def test_output_after_the_terminal_is_closed_does_not_end_the_training(tmp_path: Path) -> None:
    """A progress bar would raise an OSError before the step ends that is saved."""
    told = tmp_path / "told"
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, "-c", TERMINAL, str(told)])
    assert b"ready" in os.read(terminal, 100)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert told.read_text() == "SIGHUP"
