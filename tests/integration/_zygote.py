"""Processes that have torch and transformers already imported: forked from one that did nothing else.

    with Zygote(tmp_path) as zygote:
        child = zygote.start("tests.integration._attempts", "train", output_dir="out", run_url="run")
        assert child.wait() == 0

The zygote starts no thread and touches no storage client, which would not survive the fork. A child is an ordinary
process from there on: it ends by returning, by an exception (exit code 1 and a traceback in its log) or by SIGKILL. Only
the modules are not taken down one by one, after all exit handlers ran: that takes longer than a training of 12 steps.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from tests import stage_all

REPOSITORY = Path(__file__).resolve().parents[2]
PATIENCE = 120.0
"""Seconds that one child may take on a slow and busy machine; they take one or two."""
POLL = 0.005
IGNORED = [
    # As in pyproject.toml.
    (UserWarning, "'pin_memory' argument is set as true"),
    (FutureWarning, "`is_gradient_checkpointing` is deprecated"),
]


class Child:
    """One forked process."""

    def __init__(self, zygote: Zygote, pid: int, log: Path, answer: Path) -> None:
        self.pid = pid
        self._zygote = zygote
        self._log = log
        self._answer = answer
        self._code: int | None = None

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self._code is None:
            self._code = self._zygote.ask({"poll": self.pid})
        return self._code

    def wait(self, seconds: float = PATIENCE) -> int:
        """The exit code. Kills it and raises TimeoutError, with its output, after too long."""
        deadline = time.monotonic() + seconds
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"still running after {seconds} s:\n{self.log}")
            time.sleep(POLL)
        return code

    def kill(self) -> int:
        """SIGKILL, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)  # not reaped yet, so the pid is still its own
        return self.wait()

    def interrupt(self) -> None:
        """Ctrl-C."""
        os.kill(self.pid, signal.SIGINT)

    @property
    def log(self) -> str:
        """Its stdout and stderr."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    @property
    def value(self) -> Any:
        """What the function returned."""
        return json.loads(self._answer.read_text())


class Zygote:
    """The process that forks."""

    def __init__(self, folder: Path, preload: str) -> None:
        """`folder` takes the logs; `preload` is the module whose imports and `warm_up()` are paid once."""
        self._folder = folder
        self._count = 0
        command = [sys.executable, "-m", "tests.integration._zygote", preload]
        # One thread: sums in one order, and two tests at once do not fight for cores.
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPOSITORY, env=env, text=True
        )

    def __enter__(self) -> Zygote:  # noqa: PYI034 - typing.Self came with Python 3.11
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()  # it kills what is left, and ends
        self._process.wait(PATIENCE)
        self._process.stdout.close()

    def start(
        self, module: str, function: str, /, *, env: Mapping[str, str] | None = None, **arguments: Any
    ) -> Child:
        """Fork a process that calls `module.function(**arguments)`; what it returns must be JSON.

        Args:
            env: added to the environment as it is here and now.
        """
        self._count += 1
        log, answer = (self._folder / f"{self._count:03d}-{function}.{kind}" for kind in ("log", "json"))
        request = {
            "module": module,
            "function": function,
            "arguments": arguments,
            "env": {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
            "log": str(log),
            "answer": str(answer),
        }
        return Child(self, self.ask(request), log, answer)

    def ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(request, default=str) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the zygote ended with exit code {self._process.wait(PATIENCE)}")
        return json.loads(answer)


class _End:
    """How a child leaves; registered before all imports, so that it is the last of the exit handlers."""

    code: int | None = None
    """None: the interpreter's own way, as that of the zygote and after Ctrl-C."""
    pid = 0

    @classmethod
    def leave(cls) -> None:
        if cls.code is not None and os.getpid() == cls.pid:  # not what the child itself has forked
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(cls.code)


def serve(preload: str) -> None:
    """The loop of the zygote: fork and reap on request, until stdin is closed."""
    atexit.register(_End.leave)
    importlib.import_module(preload).warm_up()
    check_no_threads()
    gc.collect()
    gc.freeze()  # Trainer collects garbage at each start: a quarter of a second with all that is imported
    children: set[int] = set()
    while line := sys.stdin.readline():
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            children.discard(pid)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                live(request)
            children.add(answer)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def live(request: dict[str, Any]) -> NoReturn:
    """What a child does."""
    os.environ.clear()
    os.environ.update(request["env"])
    with open(os.devnull) as nothing, open(request["log"], "w") as log:
        os.dup2(nothing.fileno(), 0)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    warnings.simplefilter("error")
    for category, message in IGNORED:
        warnings.filterwarnings("ignore", message, category)
    function = getattr(importlib.import_module(request["module"]), request["function"])
    if stage_all.is_on():
        stage_all.stage_all()
    sys.argv = [request["function"]]
    _End.code, _End.pid = 1, os.getpid()
    try:
        value = function(**request["arguments"])
    except SystemExit as end:
        _End.code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    except KeyboardInterrupt:
        _End.code = None
        raise
    Path(request["answer"]).write_text(json.dumps(value))
    _End.code = 0
    sys.exit(0)


def check_no_threads() -> None:
    """Python threads would be missing in the children, with the locks they hold."""
    import threading

    if threading.active_count() > 1:
        raise RuntimeError(f"importing started threads: {threading.enumerate()}")


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        serve(sys.argv[1])
