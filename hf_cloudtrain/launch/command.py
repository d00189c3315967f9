"""Run a command with the hook, as if its own shell had started it: its output, its signals and its exit code are kept."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType

from hf_cloudtrain.errors import PreemptedExit
from hf_cloudtrain.launch.afterwards import what_is_safe
from hf_cloudtrain.launch.before import newest_attempt, prepare
from hf_cloudtrain.launch.environment import hooked, is_off
from hf_cloudtrain.launch.notes import read_notes, why_nothing
from hf_cloudtrain.runtime.process_tree import terminate

PASSED_ON = ("SIGTERM", "SIGHUP", "SIGINT", "SIGQUIT", "SIGUSR1", "SIGUSR2")
NOT_FOUND, NOT_EXECUTABLE = 127, 126
"""Exit codes of a shell: https://pubs.opengroup.org/onlinepubs/9799919799/utilities/V3_chap02.html#tag_19_08_02."""
IGNORES_HOOK = "IES"
"""Options of python that leave `PYTHONPATH` or `sitecustomize` out."""
TAKES_VALUE = "--check-hash-based-pycs"
"""The long option of python that has a value."""


def run(
    command: Sequence[str],
    run_url: str,
    say: Callable[[str], None],
    environment: Mapping[str, str],
    resume_option: str | None = None,
) -> int:
    """Run it to its end; gives its exit code, 128 and the number for a signal.

    Args:
        say: shows a message to the user.
        environment: of the command, without the hook.
        resume_option: option of the command that names the newest state of Accelerator; added once there is one.

    Raises:
        StorageError: the storage does not answer.
    """
    if is_off(environment):
        say(
            "HF_CLOUDTRAIN_LAUNCH is 'off', so nothing is hooked: the command runs as without `cloudtrain launch`."
        )
        return _run(command, environment, say)
    if (option := ignoring_option(command)) is not None:
        say(
            f"`{command[0]} {option}` does not read the hook. Leave {option} out, or nothing of it is uploaded."
        )
    prepared = prepare(run_url, command, say)
    folder, before = prepared.folder, newest_attempt(run_url)
    with _notes(folder) as path:
        more = () if folder is None or resume_option is None else (resume_option, folder)
        found = {**environment, **prepared.variables}
        code = _run([*command, *more], hooked(found, run_url=run_url, notes=path), say)
        if code in (NOT_FOUND, NOT_EXECUTABLE):
            return code
        notes = read_notes(path)
    reason, told = why_nothing(notes), {note.what for note in notes}
    if reason is not None and newest_attempt(run_url) == before:  # no script has used the package itself
        say(f"`cloudtrain launch` has hooked no training, so it uploaded nothing: {reason}.")
    elif code not in (0, PreemptedExit.CODE) and "refused" not in told:
        say(what_is_safe(run_url, notes, code))
    return code if "not-stored" not in told else code or 1


def ignoring_option(command: Sequence[str]) -> str | None:
    """The option with which a Python does not read the hook, such as `-I`; None without one."""
    words = iter(command)
    if not os.path.basename(next(words)).startswith("python"):
        return None
    for word in words:
        if word == TAKES_VALUE:
            next(words, None)
            continue
        if not word.startswith("-") or word.startswith("--") or word == "-":
            return None
        for at, letter in enumerate(word[1:], 2):
            if letter in IGNORES_HOOK:
                return word
            if letter in "cm":  # what follows is the program's
                return None
            if letter in "WX":  # its value is the rest of the word, or the next one
                if at == len(word):
                    next(words, None)
                break
    return None


def _run(command: Sequence[str], environment: Mapping[str, str], say: Callable[[str], None]) -> int:
    try:
        process = subprocess.Popen(command, env=dict(environment), preexec_fn=_end_with_parent)  # noqa: PLW1509
    except FileNotFoundError:
        say(f"Error: the command {command[0]!r} was not found. {_hint(command[0])}")
        return NOT_FOUND
    except OSError as error:
        hint = f" Write `python {command[0]}`." if command[0].endswith(".py") else ""
        say(f"Error: {command[0]!r} cannot be executed ({error.strerror}).{hint}")
        return NOT_EXECUTABLE
    with _signals_passed_on(process.pid):
        code = process.wait()
    return code if code >= 0 else 128 - code


def _hint(missing: str) -> str:
    if missing.endswith(".py") and os.path.exists(missing):
        return f"Write `python {missing}`."
    if len(missing.split()) > 1:
        return "Write its words after `--` without quotes around all of them."
    return "Check its spelling, and that its environment is active."


@contextlib.contextmanager
def _signals_passed_on(pid: int) -> Iterator[None]:
    """Pass signals on to the processes below that have a handler for them: a launcher without one would leave them behind."""

    def pass_on(number: int, _frame: FrameType | None) -> None:
        if not _came_from_terminal(number):  # a terminal has sent it to the command, too
            terminate(pid, number)

    before = {}
    for name in PASSED_ON:
        number = getattr(signal, name)
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup asks
            before[number] = signal.signal(number, pass_on)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _came_from_terminal(number: int) -> bool:
    """Whether a signal is one of the keyboard, and this process is in the foreground of a terminal."""
    if number not in (signal.SIGINT, signal.SIGQUIT):
        return False
    try:
        with open("/dev/tty") as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False


def _end_with_parent() -> None:
    """Let the command receive SIGTERM if this process is killed: a training that no process waits for would go on beside its restart.

    https://man7.org/linux/man-pages/man2/PR_SET_PDEATHSIG.2const.html
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)


@contextlib.contextmanager
def _notes(restored: str | None) -> Iterator[str]:
    """The file of notes, with that of this process."""
    folder = tempfile.mkdtemp(prefix="cloudtrain-launch-")
    path = os.path.join(folder, "notes")
    with open(path, "w", encoding="utf-8") as file:
        if restored is not None:
            file.write(f"{os.getpid()}\trestored\t{restored}\n")
    try:
        yield path
    finally:
        shutil.rmtree(folder, ignore_errors=True)
