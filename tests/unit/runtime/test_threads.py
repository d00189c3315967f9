"""Work in threads: an error does not keep alive what the work has seen."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
import threading
import weakref
from functools import partial

import pytest

from hf_cloudtrain.runtime.threads import Background, SafeTurn, answer_in_time


class Data:
    """Stands for gigabytes."""


def fail() -> weakref.ref[Data]:
    data = Data()
    alive = weakref.ref(data)

    def work(data: Data = data) -> None:
        raise ValueError(f"cannot send {data}")

    with pytest.raises(ValueError, match="cannot send"):
        answer_in_time(work, lambda: False)
    return alive


def test_an_error_is_freed_at_once_with_all_that_the_work_has_seen() -> None:
    gc.collect()
    gc.disable()
    try:
        assert fail()() is None
    finally:
        gc.enable()


class HostileError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def test_a_safe_turn_names_each_kind_of_error_once(caplog: pytest.LogCaptureFixture) -> None:
    turn = SafeTurn("The heartbeat")
    for error in (KeyError("a"), KeyError("b"), HostileError(), ValueError("s3://user:secret@bucket")):
        with turn:
            raise error
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [
        next(name for name in ("KeyError", "HostileError", "ValueError") if name in text) for text in warnings
    ] == [
        "KeyError",
        "HostileError",
        "ValueError",
    ]
    assert all(text.startswith("The heartbeat met an unexpected error and continues") for text in warnings)
    assert "secret" not in caplog.messages[-1]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1)])
def test_a_safe_turn_ends_where_the_process_ends(error: BaseException) -> None:
    with pytest.raises(type(error)), SafeTurn("The heartbeat"):
        raise error


def test_background_work_is_done_in_order_and_survives_errors(caplog: pytest.LogCaptureFixture) -> None:
    done, may_begin, background = list[int](), threading.Event(), Background("The removal")
    background.settle(0.0)
    for work in (may_begin.wait, {}.popitem, partial(done.append, 1), partial(done.append, 2)):
        background.add(work)
    background.settle(0.0)
    assert done == [], "nothing waits for it"
    may_begin.set()
    background.settle(60.0)
    assert done == [1, 2]
    assert "The removal met an unexpected error and continues, as does the training: KeyError" in caplog.text


def background_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "cloudtrain-background"}


def test_the_thread_of_a_background_ends_when_it_is_closed_and_later_work_starts_a_new_one() -> None:
    before, done, background = background_threads(), list[int](), Background("The removal")
    for number in (1, 2):
        background.add(partial(done.append, number))
        (thread,) = background_threads() - before
        background.close()
        thread.join(60.0)
        assert not thread.is_alive()
        assert done == list(range(1, number + 1)), "what was added before is done"


def test_settle_waits_for_work_from_before_the_close() -> None:
    done, background = list[int](), Background("The removal")
    may_begin = hold(background)
    background.add(partial(done.append, 1))
    background.close()
    background.settle(0.01)
    assert done == []
    may_begin.set()
    background.settle(60.0)
    assert done == [1]


def test_work_that_is_added_after_the_close_is_done_after_that_from_before() -> None:
    done, background = list[int](), Background("The removal")
    may_begin = hold(background)
    background.add(partial(done.append, 1))
    background.close()
    background.add(partial(done.append, 2))
    background.settle(0.05)
    assert done == []
    may_begin.set()
    background.settle(60.0)
    assert done == [1, 2]


def hold(background: Background) -> threading.Event:
    """Let its thread do nothing until the event is set."""
    may_begin = threading.Event()
    background.add(may_begin.wait)
    return may_begin


def test_a_background_that_is_closed_again_and_again_keeps_nothing_of_the_old_threads() -> None:
    background = Background("The removal")
    for _ in range(3):
        background.add(int)
        background.close()
    background.settle(60.0)
    registered = [found.peek() for found in weakref.finalize._registry]  # type: ignore[attr-defined]
    assert not [found for found in registered if found and found[0] is background]


AT_EXIT = """
from hf_cloudtrain.runtime.threads import at_exit

def fail(error):
    raise error

at_exit(lambda: print("uploads are finished"))
at_exit(lambda: fail(KeyboardInterrupt()))
at_exit(lambda: fail(ValueError("s3://user:secret@bucket")))
"""


def test_ctrl_c_or_an_error_in_one_task_at_exit_does_not_skip_those_before_it() -> None:
    done = subprocess.run([sys.executable, "-c", AT_EXIT], capture_output=True, text=True, check=False)
    assert done.stdout == "uploads are finished\n"
    assert "A task at the end of the process failed: ValueError" in done.stderr
    assert "Traceback" not in done.stderr
    assert "secret" not in done.stderr


class Owner:
    def __init__(self) -> None:
        self.background = Background("The removal")
        self.background.add(self.work)

    def work(self) -> None: ...


def test_the_thread_of_a_background_ends_when_its_owner_is_garbage() -> None:
    before = background_threads()
    owner = Owner()
    owner.background.settle(60.0)
    (thread,) = background_threads() - before
    del owner
    gc.collect()
    thread.join(60.0)
    assert not thread.is_alive()
